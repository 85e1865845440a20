"""Two instances of one name with different priorities: every gateway interface gives the best ready instance."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from regd_client import blocking
from tests.gateways.consumers import Site
from tests.gateways.test_serve import ask, get
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.polling import block_until

BEST, OTHER = 5061, 5062
HOSTS = {BEST: "127.0.0.1", OTHER: "::1"}


def by_resolve(site: Site) -> set[int]:
    assert site.client.resolve_all("shop")[0].port == site.client.resolve("shop").port
    return {site.client.resolve("shop").port for _ in range(4)}


def by_http(site: Site) -> set[int]:
    instances = json.loads(get(f"{site.url}/v1/resolve?name=shop&all=true")[1])["instances"]
    ports = [json.loads(get(f"{site.url}/v1/resolve?name=shop")[1])["port"] for _ in range(4)]
    return {instances[0]["port"], *ports}


def by_named_url(site: Site) -> set[int]:
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    request = urllib.request.Request(f"{site.url}/cart", headers={"Host": "shop.localhost"})
    try:
        urllib.request.build_opener(Stay).open(request, timeout=WAIT_S)
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == 307
            return {int(error.headers["Location"].removeprefix("http://shop.localhost:").removesuffix("/cart"))}
    raise AssertionError("no redirect")


def by_traefik(site: Site) -> set[int]:
    services = json.loads(get(f"{site.url}/v1/traefik")[1])["http"]["services"]
    servers = services["shop"]["loadBalancer"]["servers"]
    return {int(server["url"].rpartition(":")[2]) for server in servers}


def by_srv(site: Site) -> set[int]:
    answer = ask(site.dns, "_http._tcp.shop.regd.internal", "SRV").answer
    return {record.port for record in answer[0]} if answer else set()


def by_address(site: Site) -> set[int]:
    """Return the ports of the instances that have an A or AAAA record. Each instance has its own family."""
    found = {type: ask(site.dns, "shop.regd.internal", type).answer for type in ("A", "AAAA")}
    return {port for port, type in ((BEST, "A"), (OTHER, "AAAA")) if found[type]}


WAYS: list[Callable[[Site], set[int]]] = [by_resolve, by_http, by_named_url, by_traefik, by_srv, by_address]


def check(site: Site, port: int) -> None:
    """Check that every interface leads to this port only. DNS learns of a change a moment later."""
    block_until(lambda: by_srv(site) == {port})
    for way in WAYS:
        assert way(site) == {port}, way.__name__


@contextlib.contextmanager
def ready(process: DaemonProcess, port: int, priority: int) -> Iterator[blocking.Client]:
    """Register an instance that is held by its own connection."""
    with (
        blocking.Client(process.addresses[0]) as client,
        client.register("shop", port, host=HOSTS[port], instance=str(port), priority=priority),
    ):
        yield client


def test_the_best_ready_instance_is_found_in_every_way(site: Site, process: DaemonProcess) -> None:
    with ready(process, OTHER, 10):
        check(site, OTHER)
        with ready(process, BEST, 1) as best:
            check(site, BEST)
            best.update("shop", instance=str(BEST), state="draining")
            check(site, OTHER)
            best.update("shop", instance=str(BEST), state="ready")
            check(site, BEST)
            best.update("shop", instance=str(BEST), priority=11)
            check(site, OTHER)
            best.update("shop", instance=str(BEST), priority=0)
            check(site, BEST)
        check(site, OTHER)  # the best instance has left
