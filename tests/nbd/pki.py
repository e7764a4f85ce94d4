"""Certificates for a test."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificates(folder: Path) -> None:
    """An authority, a server called localhost, and a client, by the names that qemu gives files."""
    subjects = {"ca": "/CN=ca", "server": "/CN=localhost", "client": "/C=GB/O=A, B/CN=me"}
    for name, subject in subjects.items():
        words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        words += ["-subj", subject, "-days", "9"]
        words += ["-keyout", f"{name}-key.pem", "-out", f"{name}-cert.pem"]
        if name == "ca":
            words += ["-addext", "keyUsage=critical,keyCertSign"]
        else:
            words += ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]
            words += ["-addext", "basicConstraints=critical,CA:false"]
            words += ["-addext", "subjectAltName=DNS:localhost"]
        subprocess.run(
            ["openssl", "req", "-x509", *words], cwd=folder, check=True, capture_output=True
        )
