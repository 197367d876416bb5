"""The server certificate: made once, kept private, refused when damaged; and peers' ones parsed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError, ResourceError
from p2pnet.keys import sha256
from p2pnet.net.tls import (
    CERTIFICATE_BYTES_MAX,
    FILE_NAME,
    load_or_create_certificate,
    make_certificate,
    pem_of,
)

CERTIFICATE = make_certificate()


def test_the_second_start_finds_the_first_ones_certificate(tmp_path: Path) -> None:
    first = load_or_create_certificate(tmp_path / "data")
    assert load_or_create_certificate(tmp_path / "data") == first
    assert load_or_create_certificate(tmp_path / "other") != first


def test_only_its_user_can_read_the_key_and_nothing_else_is_left(tmp_path: Path) -> None:
    load_or_create_certificate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_the_key_is_not_in_the_repr() -> None:
    assert "PRIVATE" not in repr(CERTIFICATE)


def test_the_certificate_is_p256_for_the_name_p2pnet_and_long_lived() -> None:
    parsed = x509.load_der_x509_certificate(CERTIFICATE.cert_der)
    key = parsed.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["p2pnet"]
    assert parsed.not_valid_before_utc.year == 2020
    assert parsed.not_valid_after_utc.year == 2120
    assert CERTIFICATE.digest == sha256(CERTIFICATE.cert_der)


def test_a_damaged_file_is_named_and_never_replaced(tmp_path: Path) -> None:
    load_or_create_certificate(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ResourceError, match=r"grpc\.pem is damaged; delete it"):
        load_or_create_certificate(tmp_path)
    assert len(path.read_bytes()) == 300


def test_a_key_that_is_not_the_certificates_is_damage(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(CERTIFICATE.key_pem + make_certificate().cert_pem)
    with pytest.raises(ResourceError, match="damaged"):
        load_or_create_certificate(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot"):
        load_or_create_certificate(tmp_path / "file")


def test_pem_of_a_peers_certificate() -> None:
    assert pem_of(CERTIFICATE.cert_der) == CERTIFICATE.cert_pem


@pytest.mark.parametrize("der", [b"", b"\x30", b"x" * 100, bytes(CERTIFICATE_BYTES_MAX + 1)])
def test_what_is_no_certificate_is_malformed(der: bytes) -> None:
    with pytest.raises(MalformedError):
        pem_of(der)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(CERTIFICATE.cert_der) - 1), st.integers(0, 255), st.booleans())
def test_a_mutated_certificate_is_one_or_malformed(at: int, byte: int, cut: bool) -> None:
    der = bytearray(CERTIFICATE.cert_der)
    der[at] = byte
    try:
        pem_of(bytes(der[:at] if cut else der))
    except MalformedError:
        pass
