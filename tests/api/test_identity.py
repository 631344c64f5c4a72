"""Who a token makes its bearer: an identity provider's keys, and all that must not pass for them."""

import asyncio
import functools
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode

from libs.domain.catalogue import CATALOGUE
from libs.guardrails import Principal, Role
from libs.observability.registry import Metrics
from services.api import identity
from services.api.settings import ApiSettings
from tests.api.expect import found, problem
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.processes import until
from tests.running import SECRET, Api, token_of

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@functools.cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwk(kid: str, key: PrivateKey) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        return {"kid": kid} | RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {"kid": kid} | ECAlgorithm.to_jwk(key.public_key(), as_dict=True)


def claims_of(principal: Principal, **changes: Any) -> dict[str, Any]:
    """The claims of a token that is good for ten minutes; a change to None leaves a claim out."""
    now = int(time.time())
    claims = {
        "sub": str(principal.user_id),
        "tenant": principal.tenant_id,
        "role": principal.role.value,
        "iss": "sessiongate",
        "aud": "sessiongate",
        "iat": now,
        "exp": now + 600,
    }
    return {name: value for name, value in (claims | changes).items() if value is not None}


def forged(header: dict[str, Any], claims: dict[str, Any], key: bytes) -> str:
    """A token with any header at all, signed with HMAC-SHA256, as no library would make it."""
    signed = b".".join(base64url_encode(json.dumps(part).encode()) for part in (header, claims))
    signature = hmac.new(key, signed, hashlib.sha256).digest()
    return b".".join((signed, base64url_encode(signature))).decode()


class Provider:
    """An identity provider: signs tokens, and publishes its keys in a file or over HTTP."""

    def __init__(self) -> None:
        self.keys: dict[str, PrivateKey] = {"rsa": rsa_key("rsa"), "ec": ec_key("ec")}
        self.fetched = 0
        self.status = 200

    def document(self) -> str:
        # Providers publish keys for other purposes too, and some by mistake.
        others = [
            jwk("rs512", rsa_key("rsa")) | {"alg": "RS512"},
            {"kid": "shared", "kty": "oct", "k": base64url_encode(SECRET.encode()).decode()},
        ]
        return json.dumps({"keys": [jwk(kid, key) for kid, key in self.keys.items()] + others})

    def token(self, principal: Principal, kid: str = "rsa", **claims: Any) -> str:
        return self.sign(claims_of(principal, **claims), self.keys[kid], {"kid": kid})

    def sign(self, claims: dict[str, Any], key: PrivateKey, header: dict[str, Any], algorithm: str = "") -> str:
        fitting = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        return jwt.PyJWS().encode(json.dumps(claims).encode(), key, algorithm or fitting, header)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The address of the key set."""
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetched += 1
                self.send_response(provider.status)
                self.end_headers()
                self.wfile.write(provider.document().encode())

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/keys"
            server.shutdown()


@pytest.fixture
def provider() -> Provider:
    return Provider()


@pytest.fixture
def key_file(provider: Provider, tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    path.write_text(provider.document())
    return str(path)


async def enters(api: Api, token: str) -> bool:
    """Whether the token signs in. If not, the answer is a 401 that does not say why."""
    response = await api.anonymous.get("/api/v1/me", headers={b"authorization": f"Bearer {token}".encode()})
    if response.status_code == 200:
        return True
    body = problem(response, 401, "UNAUTHENTICATED")
    assert set(body) == {"type", "title", "status", "detail", "instance", "code", "correlation_id"}
    assert response.headers["www-authenticate"] == "Bearer"
    return False


async def test_tokens_of_both_kinds_of_key_sign_in(
    make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str
) -> None:
    api = await make_api(jwt_jwks=key_file, jwt_issuer="https://login.example")
    for kid in provider.keys:
        token = provider.token(clinic.operator, kid, iss="https://login.example")
        me = found(await api.anonymous.get("/api/v1/me", headers={"Authorization": f"bearer {token}"}))
        assert (me["id"], me["role"]) == (clinic.operator.user_id, "operator")
    assert not await enters(api, provider.token(clinic.operator)), "Another issuer."


async def test_a_signature_that_is_not_by_a_published_key_and_its_algorithm_is_worth_nothing(
    make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str
) -> None:
    api = await make_api(jwt_jwks=key_file)
    caller = clinic.operator
    claims = claims_of(caller)
    ours, theirs = rsa_key("rsa"), rsa_key("an attacker's")
    public = ours.public_key()
    good = provider.token(caller)
    assert await enters(api, good)
    head, body, signature = good.split(".")
    promoted = base64url_encode(json.dumps(claims | {"role": "service"}).encode()).decode()

    no_algorithms: list[object] = ["none", "None", "nOnE", None, "", [], {}]
    hmac_with_public_key = [
        forged({"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims, public.public_bytes(encoding, form))
        for encoding in (Encoding.PEM, Encoding.DER)
        for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1)
    ]
    tokens = [
        *hmac_with_public_key,
        forged({"alg": "HS256", "kid": "rsa"}, claims, provider.document().encode()),
        forged({"alg": "HS256", "kid": "rsa"}, claims, SECRET.encode()),
        forged({"alg": "RS256", "kid": "rsa"}, claims, SECRET.encode()),
        token_of(caller),
        *(forged({"alg": none, "kid": "rsa"}, claims, b"") for none in no_algorithms),
        jwt.encode(claims, "", algorithm="none", headers={"kid": "rsa"}),
        f"{head}.{body}.",
        f"{head}.{promoted}.{signature}",
        f"{head}.{body}.{signature[:-8]}AAAAAAAA",
        f"{head}.{body}",
        f"{good}.{signature}",
        provider.sign(claims, theirs, {"kid": "rsa"}),
        provider.sign(claims, theirs, {"kid": "rsa", "jwk": jwk("rsa", theirs)}),
        provider.sign(claims, theirs, {"kid": "rsa", "jku": "https://attacker.example/keys"}),
        *(provider.sign(claims, ours, {"kid": "rsa"}, alg) for alg in ("RS384", "RS512", "PS256")),
        provider.sign(claims, ours, {"kid": "rs512"}, "RS512"),
        forged({"alg": "HS256", "kid": "shared"}, claims, SECRET.encode()),
        provider.sign(claims, ours, {"kid": "ec"}),
        provider.sign(claims, ec_key("ec"), {"kid": "rsa"}),
        provider.sign(claims, ours, {}),
        provider.sign(claims, ours, {"kid": "unknown"}),
        *(forged({"alg": "RS256", "kid": kid}, claims, b"") for kid in (None, 7, "", ["rsa"], {"rsa": 1}, "\ud800")),
        provider.sign(claims, ours, {"kid": "rsa", "crit": ["exp"]}),
        forged({"alg": "RS256", "kid": "rsa", "x": json.loads("[" * 900 + "]" * 900)}, claims, b""),
        "a" * 20_000,
        "é.é.é",
    ]
    for token in tokens:
        assert not await enters(api, token), token
    assert api.runtime.metrics.sample("auth_failures_total", reason="invalid_token") == len(tokens)


async def test_the_secret_admits_its_own_algorithm_alone(api: Api, clinic: Clinic, provider: Provider) -> None:
    claims = claims_of(clinic.operator)
    assert await enters(api, jwt.encode(claims, SECRET, "HS256"))
    padded = SECRET.encode().ljust(64)
    for token in (
        provider.token(clinic.operator),
        jwt.encode(claims, padded, "HS256"),
        *(jwt.encode(claims, padded, algorithm) for algorithm in ("HS384", "HS512")),
        forged({"alg": "RS256"}, claims, SECRET.encode()),
        forged({"alg": "none"}, claims, SECRET.encode()),
    ):
        assert not await enters(api, token), token


async def test_times_are_believed_within_a_minute(
    make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str
) -> None:
    api = await make_api(jwt_jwks=key_file)
    now = int(time.time())
    accepted = [("exp", now - 50), ("nbf", now + 50), ("iat", now + 50), ("nbf", now - 10**6), ("iat", now - 10**6)]
    refused = [("exp", now - 61), ("exp", 0), ("exp", -1), ("nbf", now + 70), ("iat", now + 70)]
    for claim, moment in accepted + refused:
        claims = claims_of(clinic.operator, **{claim: moment})
        token = provider.sign(claims, provider.keys["rsa"], {"kid": "rsa"})
        assert await enters(api, token) is ((claim, moment) in accepted), (claim, moment)
    assert api.runtime.metrics.sample("auth_failures_total", reason="expired") == 3
    assert api.runtime.metrics.sample("auth_failures_total", reason="invalid_token") == 2


async def test_a_token_must_claim_everything_and_nothing_odd(
    make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str
) -> None:
    api = await make_api(jwt_jwks=key_file)
    infinity = float("inf")
    odd: dict[str, list[Any]] = {
        "sub": [None, "", "x", "0", "-1", "1.0", str(2**63), "9" * 5000, "1\x00", "\ud800"],
        "tenant": [None, 0, -1, True, "1", 1.0, 2**63, [1]],
        "role": [None, "", "king", "OPERATOR", ["operator"], {}],
        "iss": [None, "", "elsewhere", ["sessiongate"]],
        "aud": [None, "", "elsewhere", ["elsewhere"], {}],
        "iat": [None, "now", infinity],
        "exp": [None, "never", infinity, []],
        "nbf": ["now", infinity],
    }
    for claim, values in odd.items():
        for value in values:
            claims = claims_of(clinic.operator, **{claim: value})
            token = provider.sign(claims, provider.keys["rsa"], {"kid": "rsa"})
            assert not await enters(api, token), (claim, value)
    assert await enters(api, provider.token(clinic.operator, aud=["elsewhere", "sessiongate"]))


async def test_the_row_decides_who_the_user_is(
    make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str
) -> None:
    api = await make_api(jwt_jwks=key_file)
    elsewhere = await Clinic.open(clinic.database, "Elsewhere")
    doctor = await clinic.doctor()
    for stranger in (
        Principal(doctor.user_id, clinic.tenant_id, Role.OPERATOR),
        Principal(doctor.user_id, elsewhere.tenant_id, Role.DOCTOR),
        Principal(elsewhere.operator.user_id, clinic.tenant_id, Role.OPERATOR),
        Principal(2**63 - 1, clinic.tenant_id, Role.DOCTOR),
        await clinic.doctor(active=False),
    ):
        assert not await enters(api, provider.token(stranger)), stranger
    assert api.runtime.metrics.sample("auth_failures_total", reason="bad_credentials") == 5
    assert await enters(api, provider.token(doctor))


async def test_only_keys_on_the_list_sign(make_api: MakeApi, clinic: Clinic, provider: Provider, key_file: str) -> None:
    api = await make_api(jwt_jwks=key_file, jwt_kids=" ec , later")
    assert await enters(api, provider.token(clinic.operator, "ec"))
    assert not await enters(api, provider.token(clinic.operator, "rsa"))


def let_pass(api: Api, seconds: float) -> None:
    """Makes the key set of the API so much older."""
    api.app.state.identity._keys._loaded_at -= seconds


async def test_new_keys_are_fetched_for_all_who_wait_and_at_most_once_a_minute(
    make_api: MakeApi, clinic: Clinic, provider: Provider
) -> None:
    with provider.serving() as address:
        api = await make_api(jwt_jwks=address)
        assert await enters(api, provider.token(clinic.operator))
        assert provider.fetched == 1

        provider.keys["new"] = ec_key("new")
        token = provider.token(clinic.operator, "new")
        assert not await enters(api, token)
        assert provider.fetched == 1, "The set is fresh."

        let_pass(api, 61)
        assert await asyncio.gather(*(enters(api, token) for _ in range(8))) == [True] * 8
        assert provider.fetched == 2

        unknown = provider.sign(claims_of(clinic.operator), ec_key("new"), {"kid": "unknown"})
        assert not any(await asyncio.gather(*(enters(api, unknown) for _ in range(8))))
        assert provider.fetched == 2


async def test_withdrawn_keys_are_dropped_unless_the_provider_is_away(
    make_api: MakeApi, clinic: Clinic, provider: Provider
) -> None:
    with provider.serving() as address:
        api = await make_api(jwt_jwks=address)
        token = provider.token(clinic.operator, "rsa")
        del provider.keys["rsa"]
        let_pass(api, 500)
        assert await enters(api, token)
        let_pass(api, 101)
        provider.status = 500
        assert await enters(api, token)
        let_pass(api, 601)
        provider.status = 200
        assert not await enters(api, token)
        assert await enters(api, provider.token(clinic.operator, "ec"))


async def test_a_token_that_has_signed_in_is_not_believed_once_its_key_is_another(
    make_api: MakeApi, clinic: Clinic, provider: Provider
) -> None:
    with provider.serving() as address:
        api = await make_api(jwt_jwks=address)
        token = provider.token(clinic.operator, "rsa")
        assert await enters(api, token)
        provider.keys["rsa"] = rsa_key("another")
        let_pass(api, 601)
        assert not await enters(api, token)
        assert await enters(api, provider.token(clinic.operator, "rsa"))


async def test_a_token_that_has_signed_in_does_so_no_longer_than_it_is_good(api: Api, clinic: Clinic) -> None:
    token = jwt.encode(claims_of(clinic.operator, exp=int(time.time()) - identity.LEEWAY_SECONDS + 3), SECRET)
    assert await enters(api, token)

    async def is_over() -> bool:
        return not await enters(api, token)

    await until(is_over, seconds=10)


async def test_a_service_without_usable_keys_does_not_start(tmp_path: Path, provider: Provider) -> None:
    def settings(**chosen: Any) -> ApiSettings:
        nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
        return ApiSettings(database_url=nowhere, redis_url="redis://127.0.0.1:1", **chosen)

    async def complaint(chosen: ApiSettings) -> str:
        with pytest.raises(ValueError) as raised:
            await identity.identity_of(chosen, Metrics(CATALOGUE, version="test", service="tests"))
        return str(raised.value)

    assert "SESSIONGATE_JWT_SECRET" in await complaint(settings())
    path = tmp_path / "keys.json"
    assert "SESSIONGATE_JWT_JWKS" in await complaint(settings(jwt_jwks=str(path)))
    usable = provider.document()
    for document in ("", "{", "[]", "7", "{}", '{"keys": []}', '{"keys": 7}', '{"keys": [{"kty": "RSA"}]}'):
        path.write_text(document)
        assert "SESSIONGATE_JWT_JWKS" in await complaint(settings(jwt_jwks=str(path), jwt_secret=SECRET)), document
    path.write_text(usable)
    assert "allowed kid" in await complaint(settings(jwt_jwks=str(path), jwt_kids="another"))
    with provider.serving() as address:
        provider.status = 500
        assert "SESSIONGATE_JWT_JWKS" in await complaint(settings(jwt_jwks=address))
