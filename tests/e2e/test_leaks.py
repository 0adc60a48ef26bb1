"""That no secret stands anywhere but in its Secret is searched after all tests (`watched`); here, that it is found."""

from pathlib import Path

from tests.lab.leaks import Watched, forms, leaks


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
