"""Webhooks reach the public internet and the networks that are allowed, whatever their address says."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from libs.domain.outbox.dispatch import Event, NotDeliveredError
from libs.domain.outbox.events import EventName, webhook
from libs.domain.webhooks.destinations import (
    LOOKUPS,
    LOOKUPS_PER_TENANT,
    Address,
    Destinations,
    ForbiddenDestinationError,
    Lookups,
    is_public,
)
from libs.domain.webhooks.sending import Webhooks
from tests.clinic import Clinic
from tests.conftest import MakeApi
from tests.processes import until
from tests.receiver import Receiver, receiving, register
from tests.running import Api

NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254
    169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1
    198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b:1::a00:1 2002:7f00:1::
    2002:a00:1::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 3fff::1 5f00::1 100::1 fc00::1
    fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 2606:4700::1111%eth0
"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 172.15.0.1 172.32.0.1 100.63.0.1 2606:4700::1111 2a00:1450:4001::200e"


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_an_address_of_the_machine_or_the_network_around_it_is_refused(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC.split())
def test_an_address_of_the_public_internet_is_not(address: str) -> None:
    assert is_public(ip_address(address))


BAD_URLS = """
    http://example.org/ https://example.org:8443/ https://example.org:22/ ftp://example.org/ https:///x //example.org
    example.org javascript:alert(1) file:///etc/passwd https://user@example.org/ https://user:secret@example.org/
    https://example.org/#part https://127.0.0.1/ https://[::1]/ https://169.254.169.254/latest/meta-data/
    https://[::ffff:169.254.169.254]/ https://[fe80::1%25eth0]/ https://10.1.2.3/ https://example.org:0/
    https://example.org:99999/ https://exa%6Dple.org:x/ https://\x7f.org/ https://xn--\xff/
    https://aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgggggggggg.com/ https://a..b/ https://.example.org/
"""


@pytest.mark.parametrize("url", BAD_URLS.split())
def test_an_address_that_can_never_be_sent_to_is_refused_at_once(url: str) -> None:
    with pytest.raises(ForbiddenDestinationError) as refused:
        Destinations.parse("443", "").check_url(url)
    assert "example" not in str(refused.value).replace("https://example.org/webhooks", "")


@pytest.mark.parametrize("url", ["https://example.org/", "https://example.org:443/a?b=c", "https://münchen.example/x"])
def test_a_public_name_is_looked_up_when_there_is_something_to_send(url: str) -> None:
    Destinations.parse("443", "").check_url(url)


def test_what_is_allowed_is_that_network_alone() -> None:
    rules = Destinations.parse("443, 8443", "10.1.0.0/16, fd00:1::/64")
    for url in ("http://10.1.2.3:9000/", "https://[fd00:1::7]/", "https://example.org:8443/", "http://intranet:81/"):
        rules.check_url(url)
    for url in ("http://10.2.0.1/", "https://[fd00:2::7]/", "https://127.0.0.1/", "http://93.184.216.34/"):
        with pytest.raises(ForbiddenDestinationError):
            rules.check_url(url)
    named = httpx2.URL("http://intranet:81/")
    rules.check(named, ip_address("10.1.0.1"))
    for address in ("10.2.0.1", "93.184.216.34"):
        with pytest.raises(ForbiddenDestinationError):
            rules.check(named, ip_address(address))


@pytest.mark.parametrize("spelled", ["127.1", "0x7f.1", "2130706433", "017700000001", "localhost", "0"])
async def test_other_spellings_of_an_address_are_that_address(spelled: str) -> None:
    assert not any(is_public(address) for address in await Lookups().resolve(1, spelled, 443))


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that were asked of a name server that answers for `localhost` alone."""
    asked: list[str] = []
    over = threading.Event()
    system = socket.getaddrinfo

    def ask(host: str, port: int, **options: Any) -> Any:
        if host == "localhost":
            return system(host, port, **options)
        asked.append(host)
        over.wait()
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    yield asked
    over.set()


async def test_names_of_a_tenant_that_get_no_answer_keep_no_other_tenant_waiting(unanswered: list[str]) -> None:
    lookups = Lookups()
    waiting = [asyncio.create_task(lookups.resolve(1, f"{number}.example", 443)) for number in range(2 * LOOKUPS)]

    async def asked() -> bool:
        return len(unanswered) == LOOKUPS_PER_TENANT

    await until(asked)
    async with asyncio.timeout(5):
        assert ip_address("127.0.0.1") in await lookups.resolve(2, "localhost", 443)
    assert len(unanswered) == LOOKUPS_PER_TENANT
    for task in waiting:
        task.cancel()


async def test_a_name_is_asked_for_once_at_a_time_however_many_deliveries_wait_or_waited(
    unanswered: list[str],
) -> None:
    lookups = Lookups()
    for _ in range(2 * LOOKUPS_PER_TENANT):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await lookups.resolve(1, "hooks.example", 443)
    async with asyncio.timeout(5):
        assert await lookups.resolve(1, "localhost", 443)
    assert unanswered == ["hooks.example"]


class Resolver:
    """Answers each question for a name with what comes next."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, tenant_id: int, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        return [ip_address(address) for address in self.answers.pop(0).split()]


@pytest.fixture
async def allowed() -> AsyncIterator[Receiver]:
    async with receiving("127.0.0.2") as running:
        yield running


@pytest.fixture
async def forbidden(allowed: Receiver) -> AsyncIterator[Receiver]:
    """At the same port of an address that is not allowed."""
    async with receiving("127.0.0.1", int(allowed.url.rpartition(":")[2])) as running:
        yield running


@pytest.fixture
async def api_here(make_api: MakeApi) -> Api:
    return await make_api(webhook_allow_networks="127.0.0.2/32")


async def deliver(webhooks: Webhooks, clinic: Clinic, endpoint_id: int) -> int:
    event = Event(
        *(uuid4(), clinic.tenant_id, EventName.SESSION_ENDED, {"session_id": 1}),
        occurred_at=datetime.now(UTC),
        consumer=webhook(endpoint_id),
    )
    return await webhooks.deliver([event])


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    api_here: Api, clinic: Clinic, allowed: Receiver, forbidden: Receiver
) -> None:
    port = allowed.url.rpartition(":")[2]
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"http://hooks.example:{port}/")
    rebinding = Resolver("127.0.0.2", "127.0.0.1", "127.0.0.2 127.0.0.1")
    webhooks = Webhooks(api_here.runtime, resolve=rebinding)

    assert await deliver(webhooks, clinic, endpoint_id) == 204
    assert (rebinding.asked, allowed.connections) == (["hooks.example"], 1)
    for _ in range(2):
        with pytest.raises(NotDeliveredError, match="public address"):
            await deliver(webhooks, clinic, endpoint_id)
    await webhooks.close()

    assert allowed.got[0].headers["host"] == f"hooks.example:{port}"
    assert (allowed.connections, forbidden.connections) == (1, 0)


async def test_a_name_that_cannot_even_be_asked_for_is_one_that_is_not_reached(api: Api, clinic: Clinic) -> None:
    endpoint_id, _ = await register(clinic.database, clinic.operator, "https://a..b/")
    webhooks = Webhooks(api.runtime)
    with pytest.raises(NotDeliveredError, match="cannot be reached"):
        await deliver(webhooks, clinic, endpoint_id)
    await webhooks.close()


async def test_of_several_addresses_the_first_that_answers_is_enough(
    make_api: MakeApi, clinic: Clinic, allowed: Receiver
) -> None:
    api = await make_api(webhook_allow_networks="127.0.0.0/8, ::1/128")
    port = allowed.url.rpartition(":")[2]
    endpoint_id, _ = await register(clinic.database, clinic.operator, f"http://hooks.example:{port}/")
    webhooks = Webhooks(api.runtime, resolve=Resolver("::1 127.0.0.3 127.0.0.2", "127.0.0.3"))
    assert await deliver(webhooks, clinic, endpoint_id) == 204
    with pytest.raises(NotDeliveredError, match="cannot be reached: ConnectError"):
        await deliver(webhooks, clinic, endpoint_id)
    await webhooks.close()


def certificate(name: str, folder: Path) -> tuple[Path, Path]:
    """A certificate of that name, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@pytest.mark.parametrize(("certified", "good"), [("hooks.example", True), ("other.example", False)])
async def test_the_certificate_must_be_of_the_name_although_an_address_is_connected_to(
    api_here: Api, clinic: Clinic, tmp_path: Path, certified: str, good: bool
) -> None:
    crt, key = certificate(certified, tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(crt, key)
    names: list[str | None] = []
    tls.sni_callback = lambda _, name, __: names.append(name)
    async with receiving("127.0.0.2", tls=tls) as receiver:
        port = receiver.url.rpartition(":")[2]
        endpoint_id, _ = await register(clinic.database, clinic.operator, f"https://hooks.example:{port}/")
        webhooks = Webhooks(
            api_here.runtime, resolve=Resolver("127.0.0.2"), trusted=ssl.create_default_context(cafile=str(crt))
        )
        if good:
            assert await deliver(webhooks, clinic, endpoint_id) == 204
        else:
            with pytest.raises(NotDeliveredError, match="cannot be reached"):
                await deliver(webhooks, clinic, endpoint_id)
        await webhooks.close()
        assert names == ["hooks.example"]
        assert len(receiver.got) == good
