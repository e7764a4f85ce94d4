"""TLS for NBD, both ends: from credentials to a context of the standard library."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable

from ..errors import PeerError, UnsupportedFeature, UsageError
from ..secrets import TlsCredentials

PSK_FILE = "keys.psk"
_NO_KEYS = "TLS with a pre-shared key (Python has it from 3.13 on)"
_KEY_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK:!eNULL"
"""OpenSSL's words: first those by which what was recorded stays secret when the key gets known."""
_WORDS = {
    "BAD_RECORD_MAC": "the other side has another key",
    "DECRYPT_ERROR": "the other side has another key",
    "UNKNOWN_PSK_IDENTITY": "the other side has no key of this user",
    "UNEXPECTED_EOF": "the other side ended the connection",
}


def client_context(credentials: TlsCredentials) -> ssl.SSLContext:
    """The context of a client.  Raises UsageError, UnsupportedFeature, OSError (a file that
    cannot be read) and PeerError (one that holds no certificate)."""
    if credentials.endpoint != "client":
        raise UsageError(f"Expecting TLS credentials with a client endpoint: '{credentials.id}'")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not credentials.verify_peer or credentials.kind == "psk":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if credentials.kind == "psk":
        _use_key(context, credentials)
    else:
        _use_certificates(context, credentials)
    return context


def server_context(credentials: TlsCredentials) -> ssl.SSLContext:
    """The context of a server, which asks clients for certificates if peers are verified.  Raises
    the same."""
    if credentials.endpoint != "server":
        raise UsageError(f"Expecting TLS credentials with a server endpoint: '{credentials.id}'")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if credentials.kind == "psk":
        _use_keys(context, credentials)
        return context
    if not credentials.folder:
        raise UsageError(f"TLS credentials of a server need 'dir': '{credentials.id}'")
    _use_certificates(context, credentials)
    if credentials.verify_peer:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _use_certificates(context: ssl.SSLContext, credentials: TlsCredentials) -> None:
    folder, endpoint = credentials.folder, credentials.endpoint
    try:
        if not folder:
            context.load_default_certs()
        elif credentials.verify_peer:
            context.load_verify_locations(os.path.join(folder, "ca-cert.pem"))
            revoked = os.path.join(folder, "ca-crl.pem")
            if os.path.exists(revoked):
                context.load_verify_locations(revoked)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        certificate = os.path.join(folder, f"{endpoint}-cert.pem")
        if endpoint == "server" or (folder and os.path.exists(certificate)):
            key = os.path.join(folder, f"{endpoint}-key.pem")
            context.load_cert_chain(certificate, key, credentials.password)
    except ssl.SSLError as error:
        raise PeerError(f"the certificates in '{folder}' cannot be used: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)} (TLS certificates)",
                      error.filename or folder) from error  # fmt: skip


def _use_keys(context: ssl.SSLContext, credentials: TlsCredentials) -> None:
    """Admit who knows one of the keys in ``keys.psk``."""
    take: Callable[[Callable[[str | None], bytes], str | None], None] | None
    take = getattr(context, "set_psk_server_callback", None)
    if take is None:
        raise UnsupportedFeature(_NO_KEYS)
    path = os.path.join(credentials.folder, PSK_FILE)
    keys = _keys_of(path)
    if not keys:
        raise UsageError(f"'{path}' has no keys")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_KEY_CIPHERS)
    take(lambda user: keys.get(user or "", b""), None)


def _use_key(context: ssl.SSLContext, credentials: TlsCredentials) -> None:
    """Authenticate both sides by a key that they share."""
    offer: Callable[[Callable[[str | None], tuple[str | None, bytes]]], None] | None
    offer = getattr(context, "set_psk_client_callback", None)
    if offer is None:
        raise UnsupportedFeature(_NO_KEYS)
    user = credentials.username or "qemu"
    key = _key_of(credentials.key_file or os.path.join(credentials.folder, PSK_FILE), user)
    # OpenSSL's callback of this kind serves TLS 1.2; servers that offer 1.3 take that as well.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_KEY_CIPHERS)
    offer(lambda hint: (user, key))


def _key_of(path: str, user: str) -> bytes:
    key = _keys_of(path).get(user)
    if key is None:
        raise UsageError(f"'{path}' has no key of '{user}'")
    return key


def _keys_of(path: str) -> dict[str, bytes]:
    """The keys in a file of lines ``USER:HEX``, by their users."""
    found = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            user, colon, key = line.strip().partition(":")
            if not colon or user in found:
                continue
            try:
                found[user] = bytes.fromhex(key)
            except ValueError:
                raise UsageError(f"'{path}': the key of '{user}' is not hexadecimal") from None
    return found


def explained(error: Exception) -> PeerError:
    """Why a TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerError(f"its certificate is not accepted: {error.verify_message}", errno.EACCES)
    reason = getattr(error, "reason", None) or str(error)
    sought = reason.upper().replace(" ", "_")
    known = [words for word, words in _WORDS.items() if word in sought]
    return PeerError(f"TLS handshake failed: {(known or [reason])[0]}")
