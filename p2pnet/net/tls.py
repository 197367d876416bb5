"""The server's TLS certificate: self-signed, long-lived, pinned by its callers.

No authority signs it and its name says nothing: a peer's signed advert carries
the certificate, and a caller trusts that one alone (DESIGN D8). It is ECDSA
P-256 because grpc's TLS refuses Ed25519 (NO_COMMON_SIGNATURE_ALGORITHMS).
"""

from __future__ import annotations

import datetime
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from p2pnet.errors import MalformedError, ResourceError
from p2pnet.keys import sha256

SERVER_NAME = "p2pnet"
CERTIFICATE_BYTES_MAX = 4096
FILE_NAME = "grpc.pem"

# Fixed, so that no peer's wrong clock makes a certificate invalid.
_VALID_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """A certificate and its private key. `digest` is the SHA-256 of `cert_der`."""

    key_pem: bytes
    cert_pem: bytes
    cert_der: bytes
    digest: bytes

    def __repr__(self) -> str:
        return f"ServerCertificate(digest={self.digest.hex()})"  # never the key


def make_certificate() -> ServerCertificate:
    """A new key and its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _bundle(key, certificate)


def load_or_create_certificate(directory: Path) -> ServerCertificate:
    """This node's certificate, made at the first start.

    Key and certificate are one file, FILE_NAME, written at once and readable by
    its user alone, so that a crash never leaves one without the other.

    Raises:
        ResourceError: the file cannot be read or written, or is damaged.
    """
    path = directory / FILE_NAME
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        certificate = make_certificate()
        _write(path, certificate.key_pem + certificate.cert_pem)
        return certificate
    except OSError as error:
        raise ResourceError(f"cannot read {path}: {error.strerror}") from error
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        cert = x509.load_pem_x509_certificate(pem)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or cert.public_key() != key.public_key():
            raise ValueError("the key is not the certificate's")
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ResourceError(
            f"{path} is damaged; delete it, and the next start makes a new one"
        ) from error
    return _bundle(key, cert)


def pem_of(cert_der: bytes) -> bytes:
    """A peer's certificate as PEM, for a channel that trusts it alone.

    Raises:
        MalformedError: not an ECDSA certificate in DER, or over CERTIFICATE_BYTES_MAX.
    """
    if len(cert_der) > CERTIFICATE_BYTES_MAX:
        raise MalformedError(f"a certificate of {len(cert_der)} bytes is too large")
    try:
        certificate = x509.load_der_x509_certificate(cert_der)
        public_key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise MalformedError("the peer's certificate is not one") from None
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise MalformedError("the peer's certificate is not an ECDSA one")
    return certificate.public_bytes(serialization.Encoding.PEM)


def _bundle(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> ServerCertificate:
    der = certificate.public_bytes(serialization.Encoding.DER)
    return ServerCertificate(
        key_pem=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        cert_pem=certificate.public_bytes(serialization.Encoding.PEM),
        cert_der=der,
        digest=sha256(der),
    )


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}") from error
