"""Certificates for tests, made by `openssl` in folders as QEMU wants them.

authority/  what signs: nothing uses it but this module
server/     ca-cert.pem, server-cert.pem, server-key.pem: localhost and 127.0.0.1
client/     ca-cert.pem, client-cert.pem, client-key.pem
titled/     as client/, its subject a name of many parts
nobody/     ca-cert.pem
stranger/   as client/, of another authority
locked/     as client/, its key encrypted with the password "opensesame"
wrong-key/, broken/, no-authority/, half/: as client/, with what the name says; half/ has no key
mixed/      client's certificate of another authority than its ca-cert.pem
old/        a client's, and a server's, that have expired
old-ca/     a ca-cert.pem that has
recalled/   as nobody/, with a ca-crl.pem that revokes the server's certificate
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.differential.nbd_servers import tool

PASSWORD = "opensesame"
_TITLES = (
    '/C=DE/ST=b/L=w/jurisdictionC=DE/O=Acme, Ltd.+OU="x" <y>/street=1/DC=org/UID=u/SN=Lee'
    "/GN=Ann/title=Dr/serialNumber=7/emailAddress=a@b.example/CN= good"
)

_CONFIG = """[ca]
default_ca = own
[own]
database = index
crlnumber = number
default_md = sha256
default_crl_days = 9
"""


def make(folder: Path) -> None:
    """Make all of them in an empty folder."""
    _authority(folder / "authority", "Authority")
    _authority(folder / "other", "Another authority")
    for name in ("server", "client", "nobody", "stranger"):
        signer = folder / ("other" if name == "stranger" else "authority")
        (folder / name).mkdir()
        shutil.copy(signer / "ca-cert.pem", folder / name)
        if name != "nobody":
            _signed(folder / name, "client" if name == "stranger" else name, signer)
    for name in ("locked", "wrong-key", "broken", "no-authority", "half", "mixed"):
        shutil.copytree(folder / "client", folder / name)
    _spoil(folder)
    for name in ("recalled", "old", "old-ca", "titled"):
        shutil.copytree(folder / "nobody", folder / name)
    _signed(folder / "titled", "client", folder / "authority", subject=_TITLES)
    for name in ("client", "server"):
        _signed(folder / "old", name, folder / "authority", days="-1")
    (folder / "authority/whose").write_text("basicConstraints=critical,CA:TRUE\n")
    _openssl(folder / "authority", "x509", "-in", "ca-cert.pem", "-signkey", "ca-key.pem",
             "-days", "-1", "-out", "../old-ca/ca-cert.pem", "-clrext", "-extfile",
             "whose")  # fmt: skip
    _recall(folder)


def _openssl(folder: Path, *words: str) -> None:
    done = subprocess.run([tool("openssl"), *words], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def _key() -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _authority(folder: Path, name: str) -> None:
    folder.mkdir()
    _openssl(folder, "req", "-x509", *_key(), "-keyout", "ca-key.pem", "-out", "ca-cert.pem",
             "-days", "9", "-subj", f"/CN={name}", "-addext",
             "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip


def _signed(
    folder: Path, name: str, signer: Path, *, days: str = "9", subject: str | None = None
) -> None:
    _openssl(folder, "req", *_key(), "-keyout", f"{name}-key.pem", "-out", "wish", "-subj",
             subject or f"/CN={name}")  # fmt: skip
    (folder / "more").write_text(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=digitalSignature\n"
        f"extendedKeyUsage={name}Auth\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n"
    )
    _openssl(folder, "x509", "-req", "-in", "wish", "-CA", str(signer / "ca-cert.pem"), "-CAkey",
             str(signer / "ca-key.pem"), "-CAcreateserial", "-out", f"{name}-cert.pem", "-days",
             days, "-extfile", "more")  # fmt: skip


def _spoil(folder: Path) -> None:
    _openssl(folder / "locked", "pkey", "-aes256", "-passout", f"pass:{PASSWORD}", "-in",
             "../client/client-key.pem", "-out", "client-key.pem")  # fmt: skip
    shutil.copy(folder / "stranger/client-key.pem", folder / "wrong-key")
    (folder / "broken/client-cert.pem").write_text("nothing\n")
    shutil.copy(folder / "client/client-cert.pem", folder / "no-authority/ca-cert.pem")
    (folder / "half/client-key.pem").unlink()
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(folder / "stranger" / name, folder / "mixed")


def _recall(folder: Path) -> None:
    work = folder / "authority"
    (work / "config").write_text(_CONFIG)
    (work / "index").touch()
    (work / "number").write_text("01\n")
    about = ("-config", "config", "-keyfile", "ca-key.pem", "-cert", "ca-cert.pem")
    _openssl(work, "ca", *about, "-revoke", str(folder / "server/server-cert.pem"))
    _openssl(work, "ca", *about, "-gencrl", "-out", str(folder / "recalled/ca-crl.pem"))
