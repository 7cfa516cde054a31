"""TLS of the server's ports from files, which are read again when they change, so that certificates are renewed without a restart."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from knnlm.errors import InvalidInput
from knnlm_server.watched_files import WatchedFiles


@dataclass(frozen=True)
class TLSFiles:
    """PEM files: the certificate with its chain, its key, and the authorities whose client certificates are asked for
    and let in (None: none is asked for)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class _Certificates:
    """The bytes of :class:`TLSFiles`, checked to belong together."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class TLS:
    """Credentials for ports. New connections get the certificates that the files hold then; open ones keep theirs."""

    def __init__(self, files: TLSFiles) -> None:
        """Raises :class:`InvalidInput` for files that can't be read or don't belong together."""
        self.asks_for_client_certificates = files.client_ca is not None
        paths = [path for path in (files.certificate, files.key, files.client_ca) if path is not None]
        self._files = WatchedFiles(paths, lambda: _read(files))

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port."""
        given = self._files.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # Called before each handshake, on a thread of gRPC; None: nothing new.
            nonlocal given
            current = self._files.current()
            if current is given:
                return None
            given = current
            return _configuration(current)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            changed,  # type: ignore[arg-type]  # None is documented
            require_client_authentication=self.asks_for_client_certificates,
        )


def _configuration(certificates: _Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(certificates.key, certificates.certificate)], certificates.client_ca)


def _read(files: TLSFiles) -> _Certificates:
    # By the standard library first: gRPC would say in its own log that a handshake failed, but not which file is at fault.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except FileNotFoundError as error:
        missing = "tls_key" if files.certificate.is_file() else "tls_cert"
        raise InvalidInput(missing, f"is {getattr(files, _FIELDS[missing])}, but there is no such file.") from error
    except OSError as error:
        raise InvalidInput(
            "tls_cert", f"is {files.certificate}, which with the key {files.key} is no certificate that can be used: {_reason(error)}."
        ) from error
    if files.client_ca is not None:
        _check_authorities(context, files.client_ca)
    return _Certificates(
        files.certificate.read_bytes(), files.key.read_bytes(), files.client_ca.read_bytes() if files.client_ca is not None else None
    )


_FIELDS = {"tls_cert": "certificate", "tls_key": "key"}


def _check_authorities(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except FileNotFoundError as error:
        raise InvalidInput("tls_client_ca", f"is {path}, but there is no such file.") from error
    except OSError as error:
        raise InvalidInput("tls_client_ca", f"is {path}, which holds no certificates that can be used: {_reason(error)}.") from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return (error.strerror or "not in PEM format").lower()
