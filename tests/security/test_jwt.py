"""Tokens of an identity provider: who is let in by them, and every way in which they are not."""

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gateway import jwks
from gateway.jwks import AGAIN_S, FRESH_S, STALE_S, KeySet, NoKeysError
from protocol.config import LimitsConfig
from tests.harness import Lmx
from tests.logkit import logged
from tests.security.doorkit import ADMIN_KEY, Answer, DoorKit
from tests.security.test_profiles import found

ISSUER, AUDIENCE = "https://id.example.com", "lmx"
CLAIMS = {"iss": ISSUER, "aud": AUDIENCE, "sub": "user-7"}


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def document(*keys: tuple[str, Any], **more: Any) -> bytes:
    """A key set with the public halves of these keys."""
    listed = []
    for kid, key in keys:
        algorithm: Any = (
            jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
        )
        listed.append({**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", **more})
    return json.dumps({"keys": listed}).encode()


class Kit:
    """A door that knows the provider's keys."""

    def __init__(self, folder: Path, keys: bytes, limits: LimitsConfig | None = None, **security: Any) -> None:
        self.file = folder / "jwks.json"
        self.file.write_bytes(keys)
        fields: dict[str, Any] = {"inference_keys": "required", **security}
        self.door = DoorKit(folder, limits, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys=str(self.file), **fields)

    async def ask(self, token: str, path: str = "/v1/chat/completions") -> Answer:
        return await self.door.ask(path, key=token)


@pytest.fixture
def kit(tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: Any) -> Kit:
    return Kit(tmp_path, document(("r1", rsa_key), ("e1", ec_key)), jwt_admin_scope="lmx:admin")


def token(key: Any, kid: str | None = "r1", algorithm: str = "RS256", **claims: Any) -> str:
    headers = {} if kid is None else {"kid": kid}
    whole = {**CLAIMS, "exp": time.time() + 300, **claims}
    return jwt.encode({k: v for k, v in whole.items() if v is not None}, key, algorithm, headers)


async def test_a_good_token_lets_its_bearer_in_under_a_name_of_its_own(
    kit: Kit, rsa_key: rsa.RSAPrivateKey, ec_key: Any
) -> None:
    for good in (token(rsa_key), token(ec_key, "e1", "ES256"), token(rsa_key, aud=["other", AUDIENCE])):
        answer = await kit.ask(good)
        assert (answer.status, answer.body) == (200, {"client": "jwt:user-7", "admin": False})
    odd = await kit.ask(token(rsa_key, sub="Jane Doe <jane@example.com>"))
    assert "Jane" not in odd.body["client"]
    assert odd.body["client"].startswith("jwt:")
    assert (await kit.ask(kit.door.key("bot"))).status == 200  # API keys are as good as before
    assert (await kit.ask("")).status == 401


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"exp": 1}, "its time is over"),
        ({"nbf": 4_000_000_000}, "its time has not come"),
        ({"iss": "https://evil.example.com"}, "another issuer"),
        ({"aud": "another"}, "another audience"),
        ({"exp": None}, "a claim is missing"),
        ({"sub": None}, "a claim is missing"),
        ({"iss": None}, "a claim is missing"),
        ({"aud": None}, "a claim is missing"),
    ],
)
async def test_a_token_for_others_or_of_another_time_is_refused(
    kit: Kit, rsa_key: rsa.RSAPrivateKey, claims: dict[str, Any], words: str
) -> None:
    answer = await kit.ask(token(rsa_key, **claims))
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert words in answer.body["error"]["message"]


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def hmac_with_public_key(key: rsa.RSAPrivateKey) -> str:
    """What a forger makes where HMAC is taken and the public key serves as its secret."""
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'r1'})}.{part({**CLAIMS, 'exp': time.time() + 300})}"
    signature = hmac.new(pem, head.encode(), hashlib.sha256).digest()
    return f"{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


async def test_no_signature_hmac_and_the_keys_of_others_are_refused(
    kit: Kit, rsa_key: rsa.RSAPrivateKey, ec_key: Any
) -> None:
    good = token(rsa_key)
    head, body, signature = good.split(".")
    other = rsa.generate_private_key(65537, 2048)
    jwk = json.loads(document(("x", other)))["keys"][0]
    whole = {**CLAIMS, "exp": time.time() + 300}
    forged = {
        "none": f"{part({'alg': 'none'})}.{body}.",
        "None with a signature": f"{part({'alg': 'None', 'kid': 'r1'})}.{body}.{signature}",
        "hmac with the public key": hmac_with_public_key(rsa_key),
        "another's key": token(other),
        "another's key, named": token(other, "e1"),
        "a key in the token": jwt.encode(whole, other, "RS256", {"jwk": jwk, "kid": "x"}),
        "an address in the token": jwt.encode(whole, other, "RS256", {"jku": "https://evil.example.com", "kid": "x"}),
        "an algorithm that is not allowed": token(rsa_key, algorithm="RS512"),
        "another kind of key": token(ec_key, "r1", "ES256"),
        "no kid, and several keys": token(rsa_key, None),
        "changed": f"{head}.{part({**CLAIMS, 'sub': 'root', 'exp': time.time() + 300})}.{signature}",
        "cut": good[:-5],
        "no JSON": f"{part('x')}.{body}.{signature}",
        "long": f"{head}.{'A' * 20_000}.{signature}",
        "a number for a kid": f"{part({'alg': 'RS256', 'kid': 7})}.{body}.{signature}",
    }
    for name, bad in forged.items():
        for path in ("/v1/chat/completions", "/admin/models"):
            answer = await kit.ask(bad, path)
            assert answer.status in {401, 403}, (name, path, answer.body)
            assert bad not in str(answer.body)
    assert kit.door.seen == []
    assert (await kit.ask(good)).status == 200


async def test_a_key_is_for_the_algorithm_that_it_names_and_else_for_those_of_its_kind(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    both = {"jwt_algorithms": ("RS256", "RS512")}
    tokens = [token(rsa_key, algorithm=name) for name in ("RS256", "RS512")]
    named = Kit(tmp_path, document(("r1", rsa_key), alg="RS512"), **both)
    assert [(await named.ask(each)).status for each in tokens] == [401, 200]
    free = Kit(tmp_path, document(("r1", rsa_key)), **both)
    assert [(await free.ask(each)).status for each in tokens] == [200, 200]
    alone = Kit(tmp_path, document(("r1", rsa_key)))
    assert (await alone.ask(token(rsa_key, None))).status == 200  # one key needs no name
    for_encryption = Kit(tmp_path, document(("r1", rsa_key), use="enc"))
    assert (await for_encryption.ask(token(rsa_key))).status == 503


async def test_a_scope_makes_an_administrator_and_another_lets_in_at_all(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    kit = Kit(tmp_path, document(("r1", rsa_key)), jwt_scope="lmx:use", jwt_admin_scope="lmx:admin")
    asked = {
        "": (403, 403), "lmx:use": (200, 403), "other lmx:admin": (200, 200), "lmx:administrator": (403, 403)
    }  # fmt: skip
    for scope, statuses in asked.items():
        for claims in ({"scope": scope}, {"scp": scope.split()}):
            bearer = token(rsa_key, **claims)
            assert ((await kit.ask(bearer)).status, (await kit.ask(bearer, "/admin")).status) == statuses, claims
    assert (await kit.ask(ADMIN_KEY, "/admin")).status == 200


async def test_without_an_admin_scope_no_token_opens_an_admin_route(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    kit = Kit(tmp_path, document(("r1", rsa_key)))
    assert (await kit.ask(token(rsa_key, scope="admin lmx:admin "), "/admin")).status == 403


@pytest.mark.usefixtures("no_minute_ends")
async def test_tokens_are_limited_each_as_its_subject_and_bad_ones_as_their_address(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    kit = Kit(tmp_path, document(("r1", rsa_key)), LimitsConfig(inference_per_minute=2))
    for name in ("a", "b"):
        assert [(await kit.ask(token(rsa_key, sub=name))).status for _ in range(3)] == [200, 200, 429]
    assert [(await kit.ask(token(rsa_key, exp=1))).status for _ in range(3)] == [401, 401, 429]


async def test_where_no_key_is_needed_a_bad_token_is_still_refused(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    kit = Kit(tmp_path, document(("r1", rsa_key)), inference_keys="optional")
    asked = {"": 200, "unused": 200, token(rsa_key): 200, token(rsa_key, exp=1): 401}
    assert {key: (await kit.ask(key)).status for key in asked} == asked


# -- the keys ---------------------------------------------------------------------------------------------------


class Provider:
    """Answers with what the test says, and counts."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.asked = 0
        self.now = 0.0
        self.keys = KeySet("https://id.example.com/jwks", self._get, lambda: self.now)

    def _get(self, _place: str) -> bytes:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_keys_are_fetched_once_and_a_new_one_brings_the_next_fetch_forward_but_not_often(
    rsa_key: rsa.RSAPrivateKey, ec_key: Any
) -> None:
    provider = Provider(document(("r1", rsa_key)))
    for _ in range(5):
        assert await provider.keys.find("r1") is not None
    assert provider.asked == 1
    for number in range(50):  # a stranger names keys that there are not
        assert await provider.keys.find(f"no-{number}") is None
    assert provider.asked == 1
    provider.now += AGAIN_S
    provider.answer = document(("e1", ec_key))  # rotated: the old one is gone
    assert await provider.keys.find("e1") is not None
    assert await provider.keys.find("r1") is None
    assert provider.asked == 2
    provider.now += FRESH_S
    await provider.keys.find("e1")
    assert provider.asked == 3


async def test_while_the_provider_is_away_its_last_keys_go_on_for_a_day_and_no_longer(
    rsa_key: rsa.RSAPrivateKey,
) -> None:
    provider = Provider(OSError(111, "Connection refused"))
    with logged() as seen, pytest.raises(NoKeysError):
        await provider.keys.find("r1")
    assert (seen[-1]["event"], seen[-1]["why"]) == ("jwks_not_read", "Connection refused")
    with pytest.raises(NoKeysError):
        await provider.keys.find("r1")
    assert provider.asked == 1  # not again so soon
    provider.now, provider.answer = AGAIN_S, document(("r1", rsa_key))
    assert await provider.keys.find("r1") is not None
    provider.answer = b"not json"
    provider.now += STALE_S
    assert await provider.keys.find("r1") is not None
    provider.now += 1
    with pytest.raises(NoKeysError):
        await provider.keys.find("r1")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"keys": 1}',
        b"[" * 10_000,
        b'{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}',
        b'{"keys":[{"kty":"RSA"}]}',
    ],
)
async def test_what_is_no_set_of_public_keys_lets_nobody_in(text: bytes, tmp_path: Path, rsa_key: Any) -> None:
    kit = Kit(tmp_path, text)
    answer = await kit.ask(token(rsa_key))
    assert (answer.status, answer.code) == (503, "access_check_failed")
    assert kit.door.seen == []


@contextlib.contextmanager
def served(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/jwks"
    finally:
        server.shutdown()
        server.server_close()


def test_keys_come_over_http_but_not_from_where_a_redirect_points(rsa_key: rsa.RSAPrivateKey) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302 if request.path == "/jwks/away" else 200)
        request.send_header("location", "/elsewhere")
        request.end_headers()
        request.wfile.write(document(("r1", rsa_key)))

    with served(answer) as place:
        assert jwks.parse(jwks.fetch(place)).keys() == {"r1"}
        with pytest.raises(OSError, match="302"):
            jwks.fetch(f"{place}/away")


# -- the configuration --------------------------------------------------------------------------------------------

WHOLE: dict[str, Any] = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_keys": "https://id.example.com/jwks"}


def test_every_combination_that_leaves_something_open_is_a_problem_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    required = {**WHOLE, "inference_keys": "required"}
    assert found("local", **required) == found("local", **{**WHOLE, "inference_keys": "optional"}) == ""
    assert found("internet", **WHOLE, keys=0) == ""  # tokens stand in for keys
    assert "inference_keys" in found("lan", **WHOLE)
    for name in WHOLE:
        assert f"security.{name} is missing" in found("local", **{**required, name: ""})
    assert "jwt_scope" in found("local", jwt_scope="x")
    for algorithm in ("HS256", "none", "rs256"):
        assert f"{algorithm!r} is not allowed" in found("local", **required, jwt_algorithms=("RS256", algorithm))
    assert "is empty" in found("local", **required, jwt_algorithms=())
    for place in ("http://id.example.com/jwks", "file:///etc/passwd", "ftp://x", "https://", "jwks.json"):
        assert "over https" in found("local", **{**required, "jwt_keys": place}), place
    assert found("local", **{**required, "jwt_keys": "http://127.0.0.1:9/jwks"}) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "lmx[jwt]" in found("local", **required)


def test_a_start_without_readable_keys_fails_with_words(new_lmx: Callable[..., Lmx], tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    names = {"ISSUER": ISSUER, "AUDIENCE": AUDIENCE, "KEYS": str(file)}
    lmx = new_lmx(**{f"LMX_SECURITY__JWT_{k}": v for k, v in names.items()}, LMX_SECURITY__INFERENCE_KEYS="required")
    for content, words in (
        (None, "cannot be read"),
        (b"{}", "is not a JSON Web Key Set"),
        (b'{"keys":[]}', "has no keys"),
    ):
        if content is not None:
            file.write_bytes(content)
        done = lmx.cli("run", check=False)
        assert (done.returncode, words in done.stderr) == (5, True), done.stderr
