"""Certificates and keys of a federation: one authority, one server certificate, one key pair a device."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
BACKDATED = timedelta(days=1)  # or a device whose clock is a little behind would refuse a fresh certificate
# Flower's own programs talk to the SuperLink under these names, whatever devices call it.
LOOPBACK = ("localhost", "127.0.0.1")


def new_authority(name: str, now: datetime) -> tuple[bytes, bytes]:
    """Return the private key and the certificate (both PEM) of a new authority that signs server certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(f"{name} authority")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    built = (
        _builder(key, subject, subject, now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _pem(key), built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_server(authority_key: bytes, authority: bytes, hosts: tuple[str, ...], now: datetime) -> tuple[bytes, bytes]:
    """Return the private key and the certificate (both PEM) of a server that `hosts` and this machine name.

    Raises ValueError where the authority's key is none.
    """
    signer, parent = load_pem_private_key(authority_key, None), x509.load_pem_x509_certificate(authority)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is not an elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    ski = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    built = (
        _builder(key, _named("fedlth server"), parent.subject, now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski), critical=False)
    )
    return _pem(key), built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_device_key() -> tuple[bytes, bytes]:
    """Return a device's private and public key, P-384, both in OpenSSH's form: flwr 1.41 reads no other."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, _ssh_public(key.public_key())


def device_public(private: bytes) -> bytes:
    """Return the public key of a device's private key, in OpenSSH's form; raise ValueError where it is none."""
    try:
        key = load_ssh_private_key(private, None)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    return _ssh_public(key.public_key())


def certificate_faults(
    server: bytes, key: bytes, authority: bytes, hosts: tuple[str, ...], now: datetime
) -> list[tuple[str, str]]:
    """Return what is wrong with a server certificate, each as (kind, what).

    The kind says what has to change: `clock`, `server` (its certificate) or `authority` (everything). `hosts` are the
    names that must be in it. Raises ValueError where a file is no certificate or no key.
    """
    one, parent, private = (
        x509.load_pem_x509_certificate(server),
        x509.load_pem_x509_certificate(authority),
        load_pem_private_key(key, None),
    )
    found: list[tuple[str, str]] = []
    for kind, name, read in (("server", "certificate", one), ("authority", "authority's certificate", parent)):
        if now < read.not_valid_before_utc:
            found.append(("clock", f"the {name} is not valid before {read.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"))
        if now > read.not_valid_after_utc:
            found.append((kind, f"the {name} expired on {read.not_valid_after_utc:%Y-%m-%d}"))
    try:
        one.verify_directly_issued_by(parent)
    except (InvalidSignature, ValueError, TypeError):
        found.append(("server", "the certificate is not signed by this federation's authority"))
    if _public_bytes(private) != _public_bytes(one):
        found.append(("server", "the key does not belong to the certificate"))
    for host in (*hosts, *LOOPBACK):
        if host.lower() not in _names(one):
            found.append(("server", f"the certificate does not name {host}"))
    return found


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = names.get_values_for_type(x509.IPAddress)
    return {name.lower() for name in names.get_values_for_type(x509.DNSName)} | {str(one) for one in addresses}


def _general(host: str) -> x509.GeneralName:
    address = address_of(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a host is, None where it is a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _builder(
    key: ec.EllipticCurvePrivateKey, subject: x509.Name, issuer: x509.Name, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _ssh_public(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _public_bytes(holder: object) -> bytes:
    """Return the public key of a private key or a certificate in one form, so that two can be compared."""
    public = holder.public_key()  # type: ignore[attr-defined]
    return bytes(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def utc_now() -> datetime:
    """Return the time now, in UTC."""
    return datetime.now(UTC)
