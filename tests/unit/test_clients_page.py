"""`docs/clients.md` is about the clients that are locked, and about each of their features."""

import re

from tests.clients.matrix import CLIENTS, PAGE, page, version_of


def test_the_page_names_every_client_in_the_version_that_is_tested() -> None:
    head = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| | "))
    assert head == "| | " + " | ".join(f"{client.name} {version_of(client)}" for client in CLIENTS) + " |"


def test_the_page_has_a_result_for_every_feature_that_is_tried() -> None:
    tried = {(client.name, feature) for client in CLIENTS for feature in client.features}
    everything = page(dict.fromkeys(tried, True))
    written = PAGE.read_text(encoding="utf-8")
    assert re.sub(r"\*\*no\*\*", "yes", written) == everything
