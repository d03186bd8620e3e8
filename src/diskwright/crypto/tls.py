"""TLS credentials: who we are and whom we trust; `ssl` is loaded when they are made.

The folders and the rules are QEMU's, so that one set of files serves both:
- X.509: `ca-cert.pem`, perhaps `ca-crl.pem`, and `client-cert.pem` with `client-key.pem` or
  `server-cert.pem` with `server-key.pem`;
- keys that both sides know beforehand: `keys.psk`, with lines `name:key in hexadecimal digits`.
"""

from __future__ import annotations

import errno
import os

from diskwright.errors import AccessError, OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

CLIENT, SERVER = "client", "server"
ENDPOINTS = (CLIENT, SERVER)
#: The name that a client gives of itself beside a key, unless told another.
PSK_NAME = "qemu"

#: OpenSSL's numbers of what is wrong with a certificate -> QEMU's sentence.
_REASONS = {
    2: "The certificate hasn't got a known issuer",
    9: "The certificate is not yet activated",
    10: "The certificate has expired",
    18: "The certificate hasn't got a known issuer",
    19: "The certificate hasn't got a known issuer",
    20: "The certificate hasn't got a known issuer",
    21: "The certificate hasn't got a known issuer",
    23: "The certificate has been revoked",
    24: "The certificate hasn't got a known issuer",
    66: "The certificate uses an insecure algorithm",
    67: "The certificate uses an insecure algorithm",
    68: "The certificate uses an insecure algorithm",
}
_WRONG_PURPOSE = 26
#: Those that QEMU's tools see in files, but not in a certificate that a peer shows.
_TIMES = {9: "is not yet active", 10: "has expired"}
_NOT_TRUSTED = "The certificate is not trusted"


def reason_of(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a certificate, as a sentence."""
    return _REASONS.get(error.verify_code, _NOT_TRUSTED)


def refusal_of(error: ssl.SSLCertVerificationError) -> AccessError:
    """The error for a peer whose certificate is not trusted."""
    qemu = _NOT_TRUSTED if error.verify_code in _TIMES else None
    return AccessError(reason_of(error), errno=errno.EACCES, qemu=qemu)


class Credentials:
    """What one side of a TLS connection brings along.

    Attributes:
        endpoint: "client" or "server": the side.
        verify_peer: whether the other side must show that it is trusted.
    """

    def __init__(self, endpoint: str, *, verify_peer: bool = True, priority: str = "") -> None:
        if endpoint not in ENDPOINTS:
            raise OptionError(
                f"Parameter 'endpoint' does not accept value '{endpoint}'", field="endpoint"
            )
        self.endpoint = endpoint
        self.verify_peer = verify_peer
        self._priority = priority

    @property
    def names_peer(self) -> bool:
        """Whether a client checks the server's name, and so has to know it."""
        return self.endpoint == CLIENT and self.verify_peer

    def context(self) -> ssl.SSLContext:
        """The settings of a connection, made anew.

        Raises:
            OptionError: the priority is none that is understood.
        """
        import ssl

        is_client = self.endpoint == CLIENT
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER)
        made.check_hostname = self.names_peer
        made.verify_mode = ssl.CERT_REQUIRED if self.verify_peer else ssl.CERT_NONE
        made.options |= ssl.OP_NO_RENEGOTIATION  # so that sending never has to receive
        if self._priority:
            _prioritize(made, self._priority)
        self._complete(made)
        return made

    def _complete(self, context: ssl.SSLContext) -> None:
        """Add what a kind of credentials has; nothing is trusted without."""


class SystemCredentials(Credentials):
    """A client without a name of its own, who trusts whom the system trusts."""

    def __init__(self, *, verify_peer: bool = True) -> None:
        super().__init__(CLIENT, verify_peer=verify_peer)

    def _complete(self, context: ssl.SSLContext) -> None:
        context.load_default_certs()


class X509Credentials(Credentials):
    """Certificates in a folder, named as QEMU and libvirt name them.

    Args:
        folder: where `ca-cert.pem` is, and the certificate and key of the endpoint; a client may
            have none.
        endpoint: "client" or "server".
        verify_peer: whether the other side must show a certificate that `ca-cert.pem` vouches for,
            and a server one for the name that it is reached by.
        priority: words of GnuTLS that choose versions of TLS: "NORMAL:-VERS-TLS1.2".
        password: of the key's file, where it has one.
        sanity_check: look at once whether the authorities vouch for our own certificate.

    Raises:
        OptionError: files are missing, or are none that can be used.

    Example:
        >>> import diskwright
        >>> def encrypted(folder: str) -> object:
        ...     trust = diskwright.X509Credentials(folder)
        ...     words = {"file": {"tls-creds": trust}}
        ...     return diskwright.open("nbds://storage.example/disk", options=words)
    """

    def __init__(
        self,
        folder: str,
        *,
        endpoint: str = CLIENT,
        verify_peer: bool = True,
        priority: str = "",
        password: bytes = b"",
        sanity_check: bool = True,
    ) -> None:
        super().__init__(endpoint, verify_peer=verify_peer, priority=priority)
        self._folder = os.fspath(folder)
        self._password = password
        self._authorities = self._existing("ca-cert.pem")
        self._revoked = self._path("ca-crl.pem")
        self._has_crl = os.path.exists(self._revoked)
        self._certificate = self._path(f"{endpoint}-cert.pem")
        self._key = self._path(f"{endpoint}-key.pem")
        if endpoint == SERVER:
            self._existing("server-cert.pem")
            self._existing("server-key.pem")
        self._is_known = os.path.exists(self._certificate) and os.path.exists(self._key)
        if sanity_check:
            self._check_authorities()
            if self._is_known:
                self._check_ourselves()

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _existing(self, name: str) -> str:
        path = self._path(name)
        try:
            os.stat(path)
        except OSError as error:
            raise OptionError(
                f"Unable to access credentials {path}: {error.strerror}", field="dir"
            ) from error
        return path

    def _complete(self, context: ssl.SSLContext) -> None:
        import ssl

        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._trust(context)
        if self._is_known:
            self._identify(context)

    def _trust(self, context: ssl.SSLContext) -> None:
        import ssl

        try:
            context.load_verify_locations(self._authorities)
        except OSError as error:
            raise OptionError(
                f"Unable to import CA certificate list {self._authorities}", field="dir"
            ) from error
        if not self._has_crl:
            return
        try:
            context.load_verify_locations(self._revoked)
        except OSError as error:
            raise OptionError(f"Cannot load CRL '{self._revoked}'", field="dir") from error
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _identify(self, context: ssl.SSLContext) -> None:
        """Show our certificate, and prove that it is ours."""
        try:
            context.load_cert_chain(self._certificate, self._key, lambda: self._password)
        except (OSError, ValueError) as error:
            raise self._why_not_ours(error) from error

    def _why_not_ours(self, error: OSError | ValueError) -> OptionError:
        """What is wrong with our certificate or its key."""
        import ssl

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self._certificate)
        except OSError:
            return OptionError(
                f"Unable to import {self.endpoint} certificate {self._certificate}: "
                "Base64 unexpected header error.",
                field="dir",
            )
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            said = "The certificate and the given key do not match."
        else:
            said = "Base64 unexpected header error."
            with open(self._key, "rb") as file:
                if b"ENCRYPTED" in file.read(1 << 20):
                    said = "Decryption has failed."
        return OptionError(
            f"Cannot load certificate '{self._certificate}' & key '{self._key}': {said}",
            field="dir",
        )

    def _check_authorities(self) -> None:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._trust(context)
        found = context.cert_store_stats()
        if found["x509_ca"] < found["x509"]:
            raise OptionError(
                f"The certificate {self._authorities} basic constraints do not show a CA",
                field="dir",
            )
        from time import time

        now = time()
        for one in context.get_ca_certs():
            for limit, wrong, code in (("notAfter", 1, 10), ("notBefore", -1, 9)):
                if (now - ssl.cert_time_to_seconds(str(one[limit]))) * wrong > 0:
                    raise self._out_of_time("CA", self._authorities, code)

    def _out_of_time(self, whose: str, path: str, code: int) -> OptionError:
        return OptionError(f"The {whose} certificate {path} {_TIMES[code]}", field="dir")

    def _check_ourselves(self) -> None:
        """Whether whoever trusts our authorities would trust us: a handshake with ourselves."""
        import ssl

        asks = self.endpoint == SERVER
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.verify_mode = ssl.CERT_NONE if asks else ssl.CERT_REQUIRED
        for context in (client, server):
            self._complete(context)
        try:
            shake_hands(client, server)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == _WRONG_PURPOSE:
                return
            if error.verify_code in _TIMES:
                raise self._out_of_time(
                    self.endpoint, self._certificate, error.verify_code
                ) from error
            raise OptionError(
                f"Our own certificate {self._certificate} failed validation against "
                f"{self._authorities}: {reason_of(error)}",
                field="dir",
            ) from error
        except ssl.SSLError:
            return  # it can be of no use at this end, which the other end will say


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """A handshake in memory; it raises what either side does not like."""
    import ssl

    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    while sides:
        for side in tuple(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)


class PskCredentials(Credentials):
    """Keys that both sides know beforehand, in a folder's `keys.psk`.

    Args:
        folder: where `keys.psk` is.
        endpoint: "client" or "server".
        username: the name whose key a client uses.
        priority: as for `X509Credentials`.

    Raises:
        OptionError: there is no such file or name in it.
        UnsupportedError: this Python's `ssl` knows no such keys.
    """

    def __init__(
        self,
        folder: str,
        *,
        endpoint: str = CLIENT,
        username: str = PSK_NAME,
        priority: str = "",
    ) -> None:
        super().__init__(endpoint, verify_peer=False, priority=priority)
        self._path = os.path.join(os.fspath(folder), "keys.psk")
        self._name = username
        self._keys = self._read()
        if endpoint == CLIENT and username not in self._keys:
            raise OptionError(f"Username {username} not found in PSK file {self._path}")
        import ssl

        if not hasattr(ssl.SSLContext, "set_psk_client_callback"):
            raise UnsupportedError(
                "TLS by keys that both sides know (tls-creds-psk) needs Python 3.13 or later",
                hint="use certificates: tls-creds-x509",
            )

    def _read(self) -> dict[str, bytes]:
        try:
            with open(self._path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise OptionError(
                f"Unable to access credentials {self._path}: {error.strerror}", field="dir"
            ) from error
        found = {}
        for line in lines:
            name, colon, key = line.strip().rpartition(":")
            if not colon or (self.endpoint == CLIENT and name != self._name):
                continue
            try:
                found[name] = bytes.fromhex(key)
            except ValueError:
                raise OptionError(
                    f"The key of '{name}' in {self._path} is no hexadecimal number",
                    qemu=f"Cannot set PSK {self.endpoint} credentials: Error in parsing.",
                    field="dir",
                ) from None
        return found

    def _complete(self, context: ssl.SSLContext) -> None:
        context.set_ciphers("PSK")
        if self.endpoint == CLIENT:
            ours = (self._name, self._keys[self._name])
            context.set_psk_client_callback(lambda hint: ours)  # type: ignore[attr-defined,unused-ignore]  # Python 3.13's
            return
        keys = self._keys
        context.set_psk_server_callback(lambda name: keys.get(name or "", b""))  # type: ignore[attr-defined,unused-ignore]  # Python 3.13's


def _prioritize(context: ssl.SSLContext, priority: str) -> None:
    """Keep to the versions that GnuTLS's words choose.

    Raises:
        OptionError: there are words in it that choose something else.
    """
    import ssl

    names = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}
    begin, *words = priority.split(":")
    chosen = set(names)
    understood = begin in ("NORMAL", "@SYSTEM", "@SYSTEM,NORMAL", "SECURE128", "SECURE192")
    for word in words:
        if word == "-VERS-ALL":
            chosen.clear()
        elif word.startswith("-VERS-"):
            chosen.discard(word.removeprefix("-VERS-"))
        elif word.startswith("+VERS-"):
            chosen.add(word.removeprefix("+VERS-"))
        else:
            understood = False
    if not understood or not chosen or not chosen <= set(names):
        raise OptionError(
            f"The priority '{priority}' is not one that can be kept",
            qemu=f"Cannot set default TLS session priority {priority}: The request is invalid.",
            field="priority",
            hint="NORMAL, and after colons -VERS-ALL, +VERS-TLS1.2 or +VERS-TLS1.3, and the like",
        )
    context.minimum_version = min(names[name] for name in chosen)
    context.maximum_version = max(names[name] for name in chosen)
