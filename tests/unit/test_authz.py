"""`crypto/authz`: names of certificates as text, and rules about them."""

from __future__ import annotations

import pytest

from diskwright.crypto.authz import Authorization, Rule, distinguished_name
from diskwright.errors import OptionError


def test_names_as_text():
    subject = (
        (("countryName", "South Pacific"),),
        (("localityName", "R'lyeh"),),
        (("organizationName", "Lords, and Sons"),),
        (("commonName", "localhost"), ("userId", "#1 ")),
    )
    assert distinguished_name({"subject": subject}) == (
        "C=South Pacific,L=R'lyeh,O=Lords\\, and Sons,CN=localhost+UID=\\#1\\ "
    )
    assert distinguished_name({}) == ""


def test_the_first_rule_that_fits_decides():
    rules = [Rule("CN=evil", "deny"), Rule("CN=*", "allow", "glob")]
    some = Authorization(rules)
    assert some.allows("CN=good")
    assert not some.allows("CN=evil")
    assert not some.allows("O=else")
    assert Authorization(rules, "allow").allows("O=else")
    assert not Authorization(rules, "allow").allows("CN=evil")


def test_words_that_there_are_not():
    for make in (
        lambda: Rule("x", "maybe"),
        lambda: Rule("x", "allow", "regex"),
        lambda: Authorization([], "maybe"),
    ):
        with pytest.raises(OptionError, match="does not accept value"):
            make()
