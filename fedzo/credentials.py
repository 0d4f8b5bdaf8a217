"""Certificates and keys for a deployment. An authority of your own, where you have one, is better."""

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedzo.errors import ConfigError

_DAYS = 30
Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Credentials:
    """Files.

    Attributes:
        authority: its certificate.
        certificate, key: the SuperLink's.
        secret: what a SuperExec must know to run the SuperLink's ServerApps.
    """

    authority: Path
    certificate: Path
    key: Path
    secret: Path


def make_credentials(
    folder: Path, addresses: Sequence[str] = ("127.0.0.1", "::1"), names: Sequence[str] = ("localhost",)
) -> Credentials:
    """A new authority (whose key is forgotten) and a certificate of it for a SuperLink, valid for 30 days.

    Args:
        folder: is made, mode 0700.
        addresses, names: of the SuperLink, as its nodes write them; at least one.

    Raises:
        ConfigError: an address is none.
    """
    try:
        known = [ipaddress.ip_address(address) for address in addresses]
    except ValueError as error:
        raise ConfigError(f"{error}; give a host name with --name") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, own = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedzo local authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] if names else addresses[0])])
    alternatives = [x509.IPAddress(address) for address in known] + [x509.DNSName(n) for n in names]
    root = _certificate(issuer, issuer, authority, authority, x509.BasicConstraints(ca=True, path_length=0))
    leaf = _certificate(
        subject, issuer, own, authority, x509.BasicConstraints(ca=False, path_length=None), alternatives
    )
    names_of_files = ("authority.crt", "superlink.crt", "superlink.key", "superexec.secret")
    files = Credentials(*(folder / name for name in names_of_files))
    pem = serialization.Encoding.PEM
    files.authority.write_bytes(root.public_bytes(pem))
    files.certificate.write_bytes(leaf.public_bytes(pem))
    _secret(files.key, own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    _secret(files.secret, secrets.token_hex(32).encode())
    return files


def make_node_key(path: Path) -> Path:
    """A node's private key in `path` (mode 0600); returns the file with its public key, as OpenSSH writes them."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    own, public = ec.generate_private_key(ec.SECP384R1()), path.with_suffix(".pub")
    openssh = serialization.PrivateFormat.OpenSSH
    _secret(path, own.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))
    form = serialization.PublicFormat.OpenSSH
    public.write_bytes(own.public_key().public_bytes(serialization.Encoding.OpenSSH, form) + b"\n")
    return public


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    signer: Key,
    basic: x509.BasicConstraints,
    alternatives: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(basic, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(signer, hashes.SHA384())


def _secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
