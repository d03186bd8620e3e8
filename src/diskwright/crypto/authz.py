"""Who may in: rules about the names that clients' certificates have.

The kinds are QEMU's: `authz-simple`, one name; `authz-list`, rules in order.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

ALLOW, DENY = "allow", "deny"
POLICIES = (ALLOW, DENY)
EXACT, GLOB = "exact", "glob"
FORMATS = (EXACT, GLOB)

#: What GnuTLS, and so QEMU, calls the kinds that `ssl` names otherwise; the most of them as
#: RFC 4514, section 3, abbreviates them.
_SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "street",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
    "surname": "surName",
    "jurisdictionCountryName": "jurisdictionOfIncorporationCountryName",
    "jurisdictionLocalityName": "jurisdictionOfIncorporationLocalityName",
    "jurisdictionStateOrProvinceName": "jurisdictionOfIncorporationStateOrProvinceName",
}
_SPECIAL = ',+"\\<>;'


def distinguished_name(certificate: Mapping[str, Any]) -> str:
    """The subject of a certificate as `ssl` describes it, as text.

    Its parts come in the order of the certificate, as rules that are written for QEMU expect
    them; RFC 4514, section 2.1, would begin with the last. What is written of each part follows
    sections 2.2 to 2.4.
    """
    parts = []
    for group in certificate.get("subject", ()):
        parts.append("+".join(f"{_SHORT.get(kind, kind)}={_quoted(word)}" for kind, word in group))
    return ",".join(parts)


def _quoted(word: str) -> str:
    made = "".join(f"\\{letter}" if letter in _SPECIAL else letter for letter in word)
    if made[:1] in ("#", " "):
        made = f"\\{made}"
    return f"{made[:-1]}\\ " if made.endswith(" ") and len(word) > 1 else made


class Rule:
    """What becomes of one name, or of those that a pattern fits.

    Attributes:
        match: the name, or the pattern.
        policy: "allow" or "deny".
        format: "exact", or "glob" for a pattern with * and ?.
    """

    __slots__ = ("format", "match", "policy")

    def __init__(self, match: str, policy: str, format: str = EXACT) -> None:
        for name, word, known in (("policy", policy, POLICIES), ("format", format, FORMATS)):
            if word not in known:
                raise OptionError(f"Parameter '{name}' does not accept value '{word}'", field=name)
        self.match = match
        self.policy = policy
        self.format = format

    def fits(self, name: str) -> bool:
        """Whether the rule is about this name."""
        return name == self.match if self.format == EXACT else fnmatchcase(name, self.match)


class Authorization:
    """Rules about names, of which the first that fits decides.

    Args:
        rules: in order.
        policy: what becomes of names that no rule fits: "allow" or "deny".
    """

    def __init__(self, rules: Sequence[Rule], policy: str = DENY) -> None:
        if policy not in POLICIES:
            raise OptionError(
                f"Parameter 'policy' does not accept value '{policy}'", field="policy"
            )
        self._rules = tuple(rules)
        self._policy = policy

    def allows(self, name: str) -> bool:
        """Whether the owner of that name may in."""
        for rule in self._rules:
            if rule.fits(name):
                return rule.policy == ALLOW
        return self._policy == ALLOW
