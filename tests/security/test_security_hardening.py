"""The door against those who should not pass: forged headers, wrong keys, other names, broken stores."""

import ast
import contextlib
import hmac
import inspect
import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway import auth, keyring, windows
from gateway.auth import Credential, credential_of
from gateway.context import RequestContext, attach
from gateway.hosts import is_allowed, own_names
from gateway.identity import client_address, client_name, parse_hop
from gateway.keyring import Keyring
from protocol.config import LimitsConfig
from protocol.keys import KeyFile, KeyStoreError, digest_of, looks_like_a_key, new_key
from protocol.profiles import ADMIN_PER_MINUTE
from tests.logkit import logged
from tests.security.doorkit import ADMIN_KEY, CHAT, PROXIES, DoorKit

INTERNET: dict[str, Any] = {"profile": "internet", "cors_origins": ("https://chat.example.com",)}
BEHIND = {**INTERNET, "trusted_proxies": PROXIES}
TLS = {**INTERNET, "tls_certificate": "a", "tls_key": "b"}
#: The profiles as configurations; in all of them the tests come from 10.1.1.1, which is a proxy where there is one.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "local": {},
    "lan": {"profile": "lan"},
    "trusted-gateway": {"profile": "trusted-gateway", "trusted_proxies": PROXIES},
    "internet": BEHIND,
}
PROXY = "10.1.1.1"
FORWARDED = "x-forwarded-for"


@pytest.fixture(params=CONFIGURATIONS)
def any_profile(request: pytest.FixtureRequest, tmp_path: Path) -> DoorKit:
    return DoorKit(tmp_path, **CONFIGURATIONS[request.param])


class TestAdminRoutes:
    """Every route under /admin, in every profile: also those that nobody has written yet."""

    PATHS = (
        "/admin",
        "/admin/models/load",
        "/v1/admin/x",
        "//admin//health",
        "/admin/",
        "/ws/audit-logs",
        "/v1//admin/x/",
    )

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
    async def test_no_key_is_401_a_wrong_one_403_the_right_one_passes(
        self, any_profile: DoorKit, path: str, method: str
    ) -> None:
        kit, inference = any_profile, any_profile.key("bot")
        outcomes = [
            (await kit.ask(path, key=key, method=method, peer=PROXY)).status
            for key in ("", "wrong", new_key(), inference, ADMIN_KEY, kit.key("boss", scope="admin"))
        ]
        assert outcomes == [401, 403, 403, 403, 200, 200]

    async def test_no_path_that_the_router_takes_for_admin_is_taken_for_anything_else(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        for path in ("/Admin", "/administrator", "/v1/v1/admin", "/x/../admin", "/./admin", "/admin\0"):
            answer = await kit.ask(path)
            assert answer.status == 200  # inference: not a route
            assert kit.seen[-1]["path"] != "/admin"
            assert not kit.seen[-1]["path"].startswith("/admin/")

    async def test_without_an_admin_key_nobody_is_admin(self, tmp_path: Path) -> None:
        authenticator = auth.Authenticator(Keyring(None), "", keys_required=False)
        for key in (b"", b"x", digest_of(b""), ADMIN_KEY.encode()):
            with pytest.raises(auth.LmxError):
                authenticator.admin(Credential(key))

    @pytest.mark.usefixtures("no_minute_ends")
    async def test_guessing_is_slowed_for_the_guesser_alone(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, profile="lan")
        guesses = [(await kit.ask("/admin", key=f"guess-{number}")).status for number in range(ADMIN_PER_MINUTE + 3)]
        assert guesses == [403] * ADMIN_PER_MINUTE + [429] * 3
        assert (await kit.ask("/admin", key=ADMIN_KEY)).status == 200
        assert (await kit.ask("/admin", key="guess", peer="192.0.2.8")).status == 403

    async def test_a_websocket_without_the_key_is_closed_before_it_is_accepted(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        reached: list[str] = []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope["path"])

        door = kit.door.cls(inner, **kit.door.kwargs)
        for key, passes in ((b"", False), (b"Bearer wrong", False), (b"Bearer " + ADMIN_KEY.encode(), True)):
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {
                "type": "websocket",
                "path": "/v1//ws/audit-logs",
                "headers": [(b"authorization", key)],
                "client": ("1.2.3.4", 1),
            }
            attach(scope, RequestContext("r", 0.0, None))
            await door(scope, None, send)
            assert bool(reached) == passes
            assert sent == ([] if passes else [{"type": "websocket.close", "code": 1008}])


class TestInferenceKeys:
    @pytest.mark.parametrize("profile", CONFIGURATIONS)
    async def test_who_needs_a_key_is_said_by_the_profile(self, tmp_path: Path, profile: str) -> None:
        kit = DoorKit(tmp_path, **CONFIGURATIONS[profile])
        needed = profile in {"internet", "trusted-gateway"}
        keys = ("", "unused", "lmx-not-of-the-form", new_key(), kit.key(), ADMIN_KEY)
        outcomes = [(await kit.ask(key=key, peer=PROXY)).status for key in keys]
        assert outcomes == ([401] * 4 if needed else [200, 200, 200, 401]) + [200, 200]

    async def test_lan_can_want_keys_too(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, profile="lan", inference_keys="required")
        assert (await kit.ask()).status == 401
        assert (await kit.ask(key=kit.key())).status == 200

    async def test_health_is_open_to_everyone_from_everywhere(self, any_profile: DoorKit) -> None:
        for path in ("/healthz", "/v1/healthz/", "//readyz"):
            answer = await any_profile.ask(path, method="GET", host="rebound.example", peer=PROXY)
            assert answer.status == 200
            assert not [name for name in answer.headers if name.startswith("x-ratelimit")]

    async def test_both_headers_work_and_have_to_agree(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key, other = kit.key(), kit.key("other")
        assert (await kit.ask(CHAT, ("X-API-Key", key))).body["client"] == "key:id-bot"
        assert (await kit.ask(CHAT, ("Authorization", f"bEARER   {key}"))).status == 200
        assert (await kit.ask(CHAT, ("X-API-Key", key), key=key)).status == 200
        assert (await kit.ask(CHAT, ("X-API-Key", other), key=key)).status == 401
        assert (await kit.ask(CHAT, ("Authorization", f"Basic {key}"))).status == 401
        assert (await kit.ask(CHAT, ("Authorization", f"Bearer {key} {key}"))).status == 401

    @pytest.mark.parametrize("profile", CONFIGURATIONS)
    async def test_what_leaves_open_which_key_is_meant_is_401_everywhere(self, tmp_path: Path, profile: str) -> None:
        kit = DoorKit(tmp_path, **CONFIGURATIONS[profile])
        bearer = ("Authorization", f"Bearer {kit.key()}")
        for headers in (
            [bearer, bearer],
            [("X-API-Key", "a"), ("X-API-Key", "b")],
            [("Authorization", "Bearer schl\u00fcssel")],
            [("X-API-Key", b"\xff\xfe\x00")],
            [bearer, ("X-API-Key", "something-else")],
        ):
            answer = await kit.ask(CHAT, *headers, peer=PROXY)
            assert (answer.status, answer.code) == (401, "invalid_api_key")

    async def test_the_401_says_how_to_send_a_key_and_never_which_was_sent(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        answer = await kit.ask()
        assert answer.headers["www-authenticate"] == 'Bearer realm="lmx"'
        assert "Bearer" in answer.body["error"]["message"]
        assert answer.body["error"]["type"] == "authentication_error"
        with logged() as lines:
            wrong = await kit.ask(key="sent-by-a-stranger")
        assert "sent-by-a-stranger" not in str(wrong) + str(lines)

    async def test_the_body_of_who_does_not_pass_is_not_read(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        assert (await kit.ask(body=[b"x"] * 9)).parts_read == 0
        assert (await kit.ask("/admin", body=[b"x"] * 9)).parts_read == 0
        restricted = kit.key(models=("a",))
        assert (await kit.ask("/v1/models/b", key=restricted, method="GET")).status == 403

    async def test_a_large_body_is_thrown_away_after_the_answer_and_the_connection_ends(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        answer = await kit.ask(CHAT, ("content-length", "999999"), body=[b"x" * 1000] * 5)
        assert (answer.status, answer.headers["connection"], kit.seen) == (401, "close", [])

    async def test_a_revoked_key_is_refused_with_the_next_request(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        key, kept = kit.key("bot"), kit.key("kept")
        assert (await kit.ask(key=key)).status == 200
        kit.revoke("bot")
        assert [(await kit.ask(key=each)).status for each in (key, kept)] == [401, 200]
        assert (await kit.ask(key=kit.key("new"))).status == 200

    async def test_an_expired_key_is_refused(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        assert (await kit.ask(key=kit.key("old", expires_at=1.0))).status == 401
        assert (await kit.ask(key=kit.key("young", expires_at=4e9))).status == 200

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b'{"model": "a"}', 200),
            (b'{"model": "b"}', 403),
            (b'{"model": "A"}', 403),
            (b'{"model": ["a"]}', 403),
            (b'{"messages": []}', 403),
            (b'{"model": "b", "model": "a"}', 200),
            (b'{"model": "a", "model": "b"}', 403),
            (b'{"\\u006dodel": "b"}', 403),
            (b'{"model": "a", "x": {"model": "b"}}', 200),
            (b'{"model": "\\u0061"}', 200),
            (b"model=a", 400),
            (b"", 400),
            (b"[" * 100_000, 400),
        ],
    )
    async def test_a_key_reaches_its_models_only(self, tmp_path: Path, body: bytes, status: int) -> None:
        """The same answer whether or not there is such a model, and of a field given twice the last counts."""
        kit = DoorKit(tmp_path)
        key = kit.key(models=("a",))
        whole = await kit.ask(key=key, body=body)
        assert whole.status == status
        assert (await kit.ask(key=key, body=[bytes([byte]) for byte in body[:200]] or [b""])).status == status

    async def test_a_key_for_all_models_is_not_looked_into(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        assert (await kit.ask(key=kit.key(), body=b"anything")).status == 200


class TestTimingAttackResistance:
    """Keys are compared whole, as digests, by a comparison that takes the same time wherever they differ."""

    def test_every_comparison_with_a_secret_is_compare_digest_over_digests(self) -> None:
        found = []
        for module in (auth, keyring):
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("compare_digest"):
                    found.append([ast.unparse(argument) for argument in node.args])
                if isinstance(node, ast.Compare):
                    words = ast.unparse(node)
                    assert "digest" not in words, words
                    assert "_admin" not in words, words
        assert found == [["digest", "self._admin"], ["stored", "digest"]]

    def test_both_sides_are_bytes_of_one_length_whatever_was_sent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[tuple[object, object]] = []
        whole = hmac.compare_digest

        def watched(left: bytes, right: bytes) -> bool:
            compared.append((left, right))
            return whole(left, right)

        monkeypatch.setattr(hmac, "compare_digest", watched)
        kit = DoorKit(tmp_path)
        ring, key = Keyring(kit.path), kit.key()
        authenticator = auth.Authenticator(ring, digest_of(b"admin").hex(), keys_required=True)
        for sent in (key.encode(), b"a", b"\xc3\xbc" * 9, b"x" * 100_000):
            with contextlib.suppress(auth.LmxError):
                authenticator.inference(Credential(sent), "192.0.2.1")
        assert len(compared) == 5  # the admin's each time, and the record's own once
        assert {(type(left), len(left), type(right), len(right)) for left, right in compared} == {
            (bytes, 32, bytes, 32)
        }  # type: ignore[arg-type]


class TestFuzzedHeaders:
    @settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([b"authorization", b"x-api-key", b"x-forwarded-for", b"host", b"x-real-ip"]),
                st.binary(max_size=60)
                | st.sampled_from([b"Bearer ", b"Bearer", b"bearer a b", b"10.0.0.1, ", b"[::1]:x"]),
            ),
            max_size=5,
        ),
        st.sampled_from(list(CONFIGURATIONS)),
        st.sampled_from(["/admin/x", CHAT, "/v1/models/a"]),
    )
    @example([(b"authorization", b"Bearer \xc3\xa9")], "local", CHAT)
    async def test_no_header_makes_a_500_or_opens_what_is_closed(
        self, tmp_path: Path, headers: list[tuple[bytes, bytes]], profile: str, path: str
    ) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(0, 0), **CONFIGURATIONS[profile])
        answer = await kit.ask(path, *headers, peer=PROXY, host="")
        closed = path == "/admin/x" or profile in {"internet", "trusted-gateway"}
        assert answer.status in ({401, 403, 421} if closed else {200, 401, 421})

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key"]), st.binary(max_size=80)), max_size=4))
    def test_reading_a_credential_never_raises(self, headers: list[tuple[bytes, bytes]]) -> None:
        found = credential_of({"headers": headers})
        assert not (found.key and found.ambiguous)

    @settings(deadline=None)
    @given(st.binary(max_size=100))
    def test_only_what_we_made_looks_like_a_key(self, text: bytes) -> None:
        assert looks_like_a_key(new_key().encode())
        assert not looks_like_a_key(text) or (text.startswith(b"lmx-") and len(text) == 47)

    @settings(deadline=None)
    @given(st.binary(max_size=100), st.text(max_size=60))
    def test_reading_an_address_or_a_host_never_raises(self, raw: bytes, text: str) -> None:
        parse_hop(raw)
        parse_hop(text.encode("utf-8", "replace"))
        is_allowed(raw, frozenset({"a"}))


def scope_of(peer: str, *forwarded: str, **others: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in others.items()]
    return {"client": (peer, 1), "headers": headers}


def client_of(peer: str, *forwarded: str, **others: str) -> str:
    proxies = [ipaddress.ip_network(text) for text in PROXIES]
    return str(client_address(scope_of(peer, *forwarded, **others), proxies))


class TestSpoofedXForwardedFor:
    def test_from_a_stranger_it_counts_for_nothing(self) -> None:
        assert client_of("192.0.2.7", "1.1.1.1") == "192.0.2.7"
        assert client_of("192.0.2.7", "10.0.0.1") == "192.0.2.7"
        assert client_of("::ffff:192.0.2.7", "1.1.1.1") == "192.0.2.7"

    def test_what_the_client_wrote_left_of_its_own_address_is_never_reached(self) -> None:
        assert client_of(PROXY, "198.51.100.9") == "198.51.100.9"
        assert client_of(PROXY, "1.1.1.1, 198.51.100.9") == "198.51.100.9"
        assert client_of(PROXY, "10.9.9.9, 198.51.100.9, 10.2.2.2, fd00::2") == "198.51.100.9"
        assert client_of(PROXY, "1.1.1.1", "198.51.100.9") == "198.51.100.9"
        assert client_of(PROXY, "10.9.9.9, 10.8.8.8") == "10.9.9.9"

    @pytest.mark.parametrize(
        "entry",
        ["", "unknown", "1.1.1", "999.1.1.1", "_hidden", "1.1.1.1:x", "[::1", "a" * 200, "0x7f.1", "1.1.1.1 2.2.2.2"],
    )
    def test_what_is_no_address_ends_the_walk_at_the_proxy(self, entry: str) -> None:
        assert client_of(PROXY, entry) == PROXY
        assert client_of(PROXY, f"198.51.100.9, {entry}") == PROXY
        assert client_of(PROXY, f"{entry}, 198.51.100.9, 10.2.2.2") == "198.51.100.9"

    @pytest.mark.parametrize(
        ("entry", "client"),
        [
            ("198.51.100.9:4711", "198.51.100.9"),
            ("2001:db8::9", "2001:db8::9"),
            ("[2001:db8::9]", "2001:db8::9"),
            ("[2001:DB8::9]:4711", "2001:db8::9"),
            ("fe80::1%eth0", "fe80::1"),
            ("::ffff:198.51.100.9", "198.51.100.9"),
            ("  198.51.100.9\t", "198.51.100.9"),
        ],
    )
    def test_addresses_are_read_however_they_are_written(self, entry: str, client: str) -> None:
        assert client_of(PROXY, entry) == client
        assert client_of("fd00::1", entry) == client

    def test_a_chain_without_end_is_not_walked(self) -> None:
        assert client_of(PROXY, "198.51.100.9, " + "10.1.1.1, " * 100_000 + "10.1.1.2") == PROXY


class TestSpoofedXRealIP:
    def test_it_never_counts_from_a_stranger(self) -> None:
        assert client_of("192.0.2.7", x_real_ip="1.1.1.1", forwarded="for=1.1.1.1") == "192.0.2.7"

    def test_it_never_counts_from_a_proxy_either(self) -> None:
        assert client_of(PROXY, x_real_ip="1.1.1.1", forwarded="for=1.1.1.1", cf_connecting_ip="1.1.1.1") == PROXY


@pytest.mark.usefixtures("no_minute_ends")
class TestRateLimitKeySpoofing:
    async def test_a_new_forged_address_each_time_is_one_client(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=3), **{**BEHIND, "profile": "lan"})
        for number, status in enumerate([200, 200, 200, 429]):
            answer = await kit.ask(CHAT, (FORWARDED, f"1.1.1.{number}"), ("X-Real-IP", f"1.1.1.{number}"))
            assert answer.status == status
        through = [await kit.ask(CHAT, (FORWARDED, f"1.1.1.{n}, 192.0.2.99"), peer=PROXY) for n in range(4)]
        assert [answer.status for answer in through] == [200, 200, 200, 429]

    async def test_clients_behind_one_proxy_are_told_apart(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=1), **{**BEHIND, "profile": "lan"})
        for number in range(5):
            assert (await kit.ask(CHAT, (FORWARDED, f"198.51.100.{number}"), peer=PROXY)).status == 200

    def test_an_ipv6_customer_is_one_client(self) -> None:
        hops = [parse_hop(text) for text in (b"2001:db8:1:2::1", b"2001:db8:1:2:ffff::9", b"2001:db8:1:3::1", b"::1")]
        names = [client_name(hop) for hop in hops]
        assert names == ["2001:db8:1:2::/64", "2001:db8:1:2::/64", "2001:db8:1:3::/64", "::1"]

    async def test_two_keys_from_one_address_are_two_clients(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, LimitsConfig(inference_per_minute=2))
        one, two = kit.key("one"), kit.key("two")
        outcomes = [(await kit.ask(key=key)).status for key in (one, one, one, two, two, two)]
        assert outcomes == [200, 200, 429, 200, 200, 429]


class TestProxyHeadersWithAuth:
    async def test_no_forwarding_header_replaces_a_key(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **BEHIND)
        for value in ("127.0.0.1", "10.0.0.1", "::1"):
            for peer in (PROXY, "127.0.0.1"):
                assert (await kit.ask(CHAT, (FORWARDED, value), ("X-Real-IP", value), peer=peer)).status == 401
                assert (await kit.ask("/admin", (FORWARDED, value), peer=peer)).status == 401

    @pytest.mark.parametrize("profile", ["trusted-gateway", "internet"])
    async def test_past_the_proxy_not_even_a_good_key_passes(self, tmp_path: Path, profile: str) -> None:
        kit = DoorKit(tmp_path, **CONFIGURATIONS[profile])
        key = kit.key()
        for path in (CHAT, "/admin"):
            answer = await kit.ask(path, (FORWARDED, "10.1.1.1"), key=ADMIN_KEY, peer="192.0.2.7")
            assert (answer.status, answer.code) == (403, "forbidden")
        assert [(await kit.ask(key=key, peer=peer)).status for peer in (PROXY, "127.0.0.1", "192.0.2.7")] == [
            200,
            200,
            403,
        ]

    async def test_a_key_is_the_client_wherever_it_comes_from(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **BEHIND)
        key = kit.key()
        for value in ("198.51.100.9", "garbage", ""):
            assert (await kit.ask(CHAT, (FORWARDED, value), key=key, peer=PROXY)).body["client"] == "key:id-bot"
        assert kit.seen[-1]["client"][0] == "key:id-bot"


class TestHosts:
    """DNS rebinding: a page's own name that leads here is none of ours."""

    @pytest.mark.parametrize(
        "host",
        [
            "rebound.example",
            "rebound.example:1234",
            "localhost.rebound.example",
            "127.0.0.1.nip.io",
            "[::1].x",
            "a b",
            "",
            "127.0.0.1:x",
            "http://localhost",
            "xn--lcalhost-64a",
        ],
    )
    async def test_a_foreign_name_is_421(self, tmp_path: Path, host: str) -> None:
        kit = DoorKit(tmp_path)
        answer = await kit.ask(CHAT, ("host", host), host="")
        assert (answer.status, answer.code, kit.seen) == (421, "host_not_allowed", [])
        assert "rebound" not in str(answer.body)

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "LocalHost:1234",
            "lmx.localhost",
            "127.0.0.1",
            "[::1]:1234",
            "192.168.1.5:80",
            "localhost.",
            *own_names(),
        ],
    )
    async def test_our_own_names_and_all_addresses_are_answered(self, tmp_path: Path, host: str) -> None:
        assert (await DoorKit(tmp_path).ask(host=host)).status == 200

    async def test_the_configuration_adds_names_or_takes_our_own_away(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, allowed_hosts=("llm.example.com",))
        assert (await kit.ask(host="llm.example.com:443")).status == 200
        assert (await kit.ask(host="a.llm.example.com")).status == 421
        assert (await DoorKit(tmp_path, allowed_hosts=("*",)).ask(host="anything.example")).status == 200

    async def test_two_hosts_are_none(self, tmp_path: Path) -> None:
        assert (await DoorKit(tmp_path).ask(CHAT, ("host", "localhost"))).status == 421

    async def test_a_rebound_page_reaches_neither_models_nor_admin(self, any_profile: DoorKit) -> None:
        for path in ("/admin", CHAT, "/v1/models"):
            assert (await any_profile.ask(path, key=ADMIN_KEY, host="rebound.example", peer=PROXY)).status == 421


class TestCors:
    ORIGIN = "https://chat.example.com"

    async def answer(self, kit: DoorKit, origin: str, method: str = "POST", **more: Any) -> dict[str, str]:
        headers = [("origin", origin)]
        if method == "OPTIONS":
            headers += [("access-control-request-method", "POST"), ("access-control-request-headers", "authorization")]
        answer = await kit.ask(CHAT, *headers, method=method, peer=PROXY, **more)
        return {**answer.headers, "status": str(answer.status)}

    async def test_origins_are_the_profiles_unless_they_are_chosen(self, tmp_path: Path) -> None:
        allow = "access-control-allow-origin"
        assert allow not in await self.answer(DoorKit(tmp_path), self.ORIGIN)
        assert (await self.answer(DoorKit(tmp_path, profile="lan"), self.ORIGIN))[allow] == "*"
        assert allow not in await self.answer(DoorKit(tmp_path, profile="lan", cors_origins=()), self.ORIGIN)
        kit = DoorKit(tmp_path, **BEHIND)
        key = kit.key()
        assert (await self.answer(kit, self.ORIGIN, key=key))[allow] == self.ORIGIN
        assert allow not in await self.answer(kit, "https://evil.example", key=key)
        assert allow not in await self.answer(kit, f"{self.ORIGIN}.evil.example", key=key)

    async def test_a_preflight_needs_no_key_and_reaches_nothing(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **BEHIND)
        good = await self.answer(kit, self.ORIGIN, "OPTIONS")
        assert (good["status"], good["access-control-allow-headers"]) == ("200", "authorization")
        assert "access-control-allow-credentials" not in good
        assert (await self.answer(kit, "https://evil.example", "OPTIONS"))["status"] == "400"
        assert kit.seen == []

    async def test_a_page_can_read_errors_and_what_is_left(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **BEHIND)
        refused = await self.answer(kit, self.ORIGIN)
        assert (refused["status"], refused["access-control-allow-origin"]) == ("401", self.ORIGIN)
        assert "x-ratelimit-remaining-requests" in refused["access-control-expose-headers"]


class TestNothingOpensByFailing:
    @pytest.mark.parametrize("harm", [b"", b"{}", b"nonsense\n{}", b"\xff" * 100])
    async def test_a_broken_file_of_keys_refuses_whoever_depends_on_it(self, tmp_path: Path, harm: bytes) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key = kit.key()
        good = kit.path.read_bytes()
        assert (await kit.ask(key=key)).status == 200
        kit.path.write_bytes(harm)
        with logged() as lines:
            outcomes = [await kit.ask(key=each) for each in (key, new_key(), "x")]
        assert {(answer.status, answer.code) for answer in outcomes} == {(503, "access_check_failed")}
        assert (await kit.ask()).status == 401
        assert [line["level"] for line in lines if line["event"] == "keys_unreadable"] == ["ERROR"]
        assert (await kit.ask("/admin", key=ADMIN_KEY)).status == 200
        assert (await kit.ask("/healthz", method="GET")).status == 200
        kit.path.write_bytes(good)
        assert (await kit.ask(key=key)).status == 200

    async def test_keys_of_a_newer_version_and_of_a_foreign_kind_are_refused(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key = kit.key()
        text = kit.path.read_bytes()
        for harm in (text.replace(b'"schema":1', b'"schema":2'), text.replace(b"lmx.keys", b"lmx.else")):
            kit.path.write_bytes(harm)
            assert (await kit.ask(key=key)).status == 503

    async def test_a_folder_in_the_place_of_the_keys_refuses(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        kit.path.mkdir()
        assert (await kit.ask(key=new_key())).status == 503

    @pytest.mark.parametrize("harm", ["link", 0o640, 0o602, "pipe"])
    async def test_a_file_of_keys_that_others_can_reach_refuses_until_it_is_private_again(
        self, tmp_path: Path, harm: str | int
    ) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key = kit.key()
        assert (await kit.ask(key=key)).status == 200
        if isinstance(harm, int):
            kit.path.chmod(harm)
        else:
            kit.path.rename(tmp_path / "elsewhere")
            kit.path.symlink_to(tmp_path / "elsewhere") if harm == "link" else os.mkfifo(kit.path, 0o600)
        answer = await kit.ask(key=key)
        assert (answer.status, answer.code) == (503, "access_check_failed")
        if isinstance(harm, int):
            kit.path.chmod(0o600)
        else:
            (tmp_path / "elsewhere").replace(kit.path)
        assert (await kit.ask(key=key)).status == 200

    async def test_keys_that_are_gone_are_keys_no_more(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key = kit.key()
        kit.path.unlink()
        assert [(await kit.ask(key=each)).status for each in (key, "")] == [401, 401]

    def test_an_older_copy_of_the_keys_is_never_read(self, tmp_path: Path) -> None:
        kit = DoorKit(tmp_path)
        kit.key("one")
        kit.revoke("one")
        assert list(tmp_path.iterdir()) == [kit.path]
        kit.path.rename(tmp_path / "keys.prev")
        assert KeyFile(kit.path).read() == ()
        kit.path.write_text("damaged")
        with pytest.raises(KeyStoreError):
            KeyFile(kit.path).read()

    @pytest.mark.parametrize("target", ["hit", "storage"])
    async def test_a_broken_limiter_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        kit = DoorKit(tmp_path, **TLS)
        key = kit.key(tokens_per_minute=1000)

        async def broken(*_: object, **__: object) -> bool:
            raise RuntimeError("storage lost: " + key)

        if target == "hit":
            monkeypatch.setattr(windows.SlidingWindowCounterRateLimiter, "hit", broken)
        else:
            monkeypatch.setattr(windows.BoundedStorage, "acquire_sliding_window_entry", broken)
        with logged() as lines:
            answers = [await kit.ask(key=key), await kit.ask(), await kit.ask("/admin", key=ADMIN_KEY)]
        assert {(answer.status, answer.code) for answer in answers} == {(503, "access_check_failed")}
        assert kit.seen == []
        assert key not in str(answers) + str(lines)
        assert (await kit.ask("/healthz", method="GET")).status == 200

    async def test_a_bug_in_a_check_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kit = DoorKit(tmp_path)
        monkeypatch.setattr(auth.Authenticator, "inference", lambda *_: 1 / 0)
        answer = await kit.ask()
        assert (answer.status, answer.code, kit.seen) == (503, "access_check_failed", [])
