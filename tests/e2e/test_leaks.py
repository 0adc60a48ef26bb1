"""After all other tests: no secret that the lab ever held stands anywhere but in its Secret."""

from pathlib import Path

import pytest

from tests.lab.lab import Lab
from tests.lab.leaks import Watched, forms, leaks, log_files


@pytest.mark.last
def test_no_secret_is_told(lab: Lab, watched: Watched, issuer: str, tmp_path: Path) -> None:
    """Every account key, leaf key and HMAC key of the whole run, in each form, is searched in all logs, the audit log,
    Events, and every version of Certificates and issuers: none is found.

    Mutation: log the next key in `store_next_key`; put the HMAC key into the message of EABRefused.
    """
    secrets = dict(watched.secrets)
    assert secrets, f"no Secret was seen, not even of {issuer}: the search proves nothing"
    said = tmp_path / "objects"
    said.write_text("\n".join(watched.said))
    files = [*log_files(lab), said]
    found = leaks(secrets, files, tmp_path)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(
        f"\n{len(secrets)} secrets in {len(files)} files ({size:.0f} MiB) and {len(watched.said)} objects: {len(found)}"
    )
    assert found == []


@pytest.mark.last
def test_a_leak_would_be_found(watched: Watched, issuer: str, tmp_path: Path) -> None:
    """Each form of each kind of secret is found in a log that holds it, whatever stands around it.

    Mutation: leave a form out of `forms`.
    """
    assert watched.secrets, f"no Secret was seen, not even of {issuer}"
    log = tmp_path / "controller.log"
    for content, what in list(watched.secrets.items())[:20]:
        for form in forms(content):
            log.write_text(f'12:00 info {{"error":"x{form}y"}}\n')
            assert leaks({content: what}, [log], tmp_path) == [f"{what} stands in {log} line 1"]
