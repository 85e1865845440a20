"""DNS with real programs: dig, kdig, dnsmasq, unbound, and `getaddrinfo` of glibc and musl."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd_client import blocking
from tests.gateways.consumers import FOLLOW_S, Site, example, find_tool, machine, program, run
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.polling import block_until
from tests.support.ports import free_port

DIG_FLAGS = [(), ("+tcp",), ("+noedns",), ("+bufsize=512",), ("+bufsize=20000",), ("+nocookie",), ("+dnssec",),
             ("+norecurse",), ("+adflag", "+cdflag"), ("+subnet=192.0.2.0/24",), ("+ednsopt=65001:beef",),
             ("+padding=128",), ("+nsid",), ("+zflag",), ("+tcp", "+keepalive")]  # fmt: skip
SRV = ["0 1 5061 7f000001-5061.addr.regd.internal.", f"0 1 5062 {'0' * 31}1-5062.addr.regd.internal."]
WARNING = ";; WARNING: recursion requested but not available"  # the only expected warning


@pytest.fixture
def web(site: Site) -> Site:
    """A site whose DNS knows `web`, with an IPv4 and an IPv6 address, `db`, with an IPv4 address, and `eu.shop`."""
    site.register("web", 5061, instance="1")
    site.register("web", 5062, instance="2", host="::1")
    site.register("web", 5063, instance="3", priority=1)
    site.register("db", 5432)
    site.register("idle", 5433, state="starting")
    site.register("eu.shop", 5064)
    site.register("far", 5065, host="far.example")
    block_until(lambda: site.dig("far.regd.internal", "SRV", "+short"))
    return site


@pytest.mark.long
def test_dig_with_any_flags(web: Site) -> None:
    for flags in DIG_FLAGS:

        def short(*arguments: str, flags: tuple[str, ...] = flags) -> list[str]:
            return sorted(web.dig(*arguments, "+short", *flags).splitlines())

        assert short("web.regd.internal", "A") == ["127.0.0.1"], flags
        assert short("WEB.Regd.Internal", "AAAA") == ["::1"], flags
        for name in ("web.regd.internal", "_http._tcp.web.regd.internal", "_web._tcp.regd.internal"):
            assert short(name, "SRV") == SRV, flags
        answer = " ".join(web.dig("web.regd.internal", "SRV", *flags).split())
        assert "WARNING" not in answer.replace(WARNING, ""), flags
        assert "flags: qr aa" in answer, flags
        assert "7f000001-5061.addr.regd.internal. 0 IN A 127.0.0.1" in answer, flags  # the additional section


def test_dig_with_any_type(web: Site) -> None:
    def short(*arguments: str) -> list[str]:
        return sorted(web.dig(*arguments, "+short").splitlines())

    assert short("web.regd.internal", "ANY", "+notcp") == short("web.regd.internal", "ANY") == SRV
    assert short("far.regd.internal", "SRV") == ["0 1 5065 far.example."]
    assert short(f"{'0' * 31}1-5062.addr.regd.internal", "AAAA") == ["::1"]
    assert short("7f000001-9.addr.regd.internal", "ANY") == ["127.0.0.1"]


# (name, type, flags): the status, and whether there is an answer.
STATUSES = [
    (("web.regd.internal", "TXT"), "NOERROR"),
    (("db.regd.internal", "AAAA"), "NOERROR"),
    (("idle.regd.internal", "A"), "NOERROR"),
    (("far.regd.internal", "A"), "NOERROR"),
    (("shop.regd.internal", "A"), "NOERROR"),
    (("_x.web.regd.internal", "SRV"), "NOERROR"),
    (("_http._tcp.web.regd.internal", "A"), "NOERROR"),
    (("addr.regd.internal", "A"), "NOERROR"),
    (("regd.internal", "A"), "NOERROR"),
    (("nobody.regd.internal", "A"), "NXDOMAIN"),
    (("x.web.regd.internal", "A"), "NXDOMAIN"),
    (("7f000001.addr.regd.internal", "A"), "NXDOMAIN"),
    (("_http._tcp.nobody.regd.internal", "SRV"), "NXDOMAIN"),
    (("example.com", "A"), "REFUSED"),
    (("internal", "SOA"), "REFUSED"),
    ((".", "NS"), "REFUSED"),
    (("notregd.internal", "A"), "REFUSED"),
    (("web.regd.internal", "A", "-c", "CH"), "REFUSED"),
    (("version.bind", "TXT", "-c", "CH"), "REFUSED"),
    (("web.regd.internal", "A", "+opcode=status"), "NOTIMP"),
    (("regd.internal", "SOA", "+opcode=notify"), "NOTIMP"),
    (("regd.internal", "SOA", "+opcode=update"), "NOTIMP"),
    (("web.regd.internal", "A", "+edns=1", "+noednsnegotiation"), "BADVERS"),
    (("+header-only",), "FORMERR"),
]


@pytest.mark.parametrize("tcp", ["+notcp", "+tcp"])
def test_dig_shows_the_status(web: Site, tcp: str) -> None:
    for arguments, status in STATUSES:
        answer = web.dig(*arguments, tcp)
        assert f"status: {status}" in answer, arguments
        assert "ANSWER: 0" in answer, arguments
        has_soa = "regd.internal.\t\t0\tIN\tSOA\tns.regd.internal. nobody.invalid. 1 3600 600 86400 0" in answer
        assert has_soa == (status in ("NOERROR", "NXDOMAIN")), arguments


def test_dig_finds_a_zone(web: Site) -> None:
    [soa] = web.dig("regd.internal", "SOA", "+short").splitlines()
    [server] = web.dig("regd.internal", "NS", "+short").splitlines()
    assert soa.split()[0] == server == "ns.regd.internal."
    assert web.dig(server, "A", "+short") == "127.0.0.1\n"


def test_zone_transfers_are_refused(web: Site) -> None:
    for type in ("AXFR", "IXFR=1"):
        assert "Transfer failed" in web.dig("regd.internal", type)
    kdig = ("@127.0.0.1", "-p", str(web.dns), "+retry=0", "regd.internal", "AXFR")
    done = subprocess.run([find_tool("kdig"), *kdig], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert "server replied with error 'REFUSED'" in done.stdout + done.stderr


def test_dig_asks_again_by_tcp_when_an_answer_is_truncated(site: Site) -> None:
    for number in range(100):
        site.register("wide", 20_000 + number, instance=str(number))
    block_until(lambda: len(site.dig("wide.regd.internal", "SRV", "+short").splitlines()) == 100)
    for flags in (("+noedns",), ("+bufsize=512",), ("+bufsize=2000",)):
        answer = site.dig("wide.regd.internal", "SRV", *flags)
        assert "Truncated, retrying in TCP mode" in answer
        assert "ANSWER: 100" in answer
        cut = site.dig("wide.regd.internal", "SRV", "+ignore", *flags)
        assert "flags: qr aa tc rd;" in cut
        assert "ANSWER: 0" in cut
    fits = site.dig("wide.regd.internal", "SRV", "+bufsize=6000", "+ignore")  # without the additional section
    assert ("flags: qr aa rd;" in fits, "ANSWER: 100" in fits, "ADDITIONAL: 1" in fits) == (True, True, True)
    assert "ADDITIONAL: 101" in site.dig("wide.regd.internal", "SRV", "+bufsize=20000", "+ignore")


def test_many_queries_on_one_connection(web: Site, tmp_path: Path) -> None:
    path = tmp_path / "queries"
    path.write_text("web.regd.internal A\nweb.regd.internal AAAA\nnobody.regd.internal A\ndb.regd.internal A\n")
    answer = web.dig("+tcp", "+keepopen", "+short", "-f", str(path))
    assert answer.split() == ["127.0.0.1", "::1", "127.0.0.1"]


def test_kdig(web: Site) -> None:
    def kdig(*arguments: str) -> str:
        return run("kdig", "@127.0.0.1", "-p", str(web.dns), "+time=5", "+retry=0", *arguments)

    for flags in ((), ("+tcp",), ("+tcp", "+keepopen"), ("+edns",), ("+dnssec",), ("+padding=100",)):
        assert sorted(kdig("web.regd.internal", "SRV", "+short", *flags).splitlines()) == SRV
    assert "status: NXDOMAIN" in kdig("nobody.regd.internal", "A")
    assert "status: REFUSED" in kdig("example.com", "A")


# Resolvers that forward the zone, although they have filters that drop loopback addresses.


@contextlib.contextmanager
def dnsmasq(site: Site, folder: Path) -> Iterator[int]:
    port = free_port()
    path = example("dnsmasq.conf", folder, {"#7353": f"#{site.dns}"})
    flags = (
        f"--port={port}",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
        "--keep-in-foreground",
        "--pid-file=",
    )
    quiet = ("--no-resolv", "--no-hosts", "--user=", "--log-facility=-", "--stop-dns-rebind")
    with program(
        find_tool("dnsmasq"), *flags, *quiet, f"--conf-file={path}", log=folder / "dnsmasq.log"
    ):  # fmt: skip
        yield port


@contextlib.contextmanager
def unbound(site: Site, folder: Path) -> Iterator[int]:
    port = free_port()
    path = example("unbound.conf", folder, {"@7353": f"@{site.dns}"})
    main = folder / "main.conf"
    main.write_text(f"""
server:
    interface: 127.0.0.1
    port: {port}
    username: ""
    chroot: ""
    directory: "{folder}"
    pidfile: ""
    use-syslog: no
    private-address: 127.0.0.0/8
    private-address: ::1/128
remote-control:
    control-enable: no
include: "{path}"
""")
    with program(find_tool("unbound"), "-d", "-c", str(main), log=folder / "unbound.log"):
        yield port


@pytest.mark.sample(2)
@pytest.mark.parametrize("resolver", [dnsmasq, unbound])
def test_resolvers_forward_the_zone_and_cache_nothing(web: Site, tmp_path: Path, resolver: Any) -> None:
    find_tool("dig")
    with resolver(web, tmp_path) as port:

        def dig(*arguments: str, tries: str = "+tries=1") -> str:
            return run("dig", "@127.0.0.1", "-p", str(port), "+time=5", tries, *arguments)

        def short(*arguments: str) -> list[str]:
            return sorted(dig(*arguments, "+short").splitlines())

        listens = ("+time=1", "+tries=1", "web.regd.internal", "A")
        block_until(
            lambda: subprocess.run(["dig", "@127.0.0.1", "-p", str(port), *listens], stdout=subprocess.DEVNULL).returncode == 0,
            FOLLOW_S,
        )  # fmt: skip
        assert short("web.regd.internal", "A") == ["127.0.0.1"]
        assert short("web.regd.internal", "AAAA") == ["::1"]
        assert short("_http._tcp.web.regd.internal", "SRV") == SRV
        assert short("7f000001-5061.addr.regd.internal", "A") == ["127.0.0.1"]
        for name, type, status in (
            ("db", "AAAA", "NOERROR"),
            ("shop", "A", "NOERROR"),
            ("late", "A", "NXDOMAIN"),
        ):
            assert f"status: {status}" in dig(f"{name}.regd.internal", type)
        web.register("late", 5066)
        block_until(lambda: web.dig("late.regd.internal", "A", "+short"))
        assert short("late.regd.internal", "A") == ["127.0.0.1"]
        web.client.deregister("late")
        block_until(lambda: not web.dig("late.regd.internal", "A", "+short"))
        assert short("late.regd.internal", "A") == []


# `getaddrinfo` always asks port 53, so the gateway runs in its own network namespace.

MUSL = r"""
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
        printf("%s", names[i]);
        if (getaddrinfo(names[i], NULL, &hints, &list) == 0) {
            for (struct addrinfo *info = list; info; info = info->ai_next) {
                char text[64];
                getnameinfo(info->ai_addr, info->ai_addrlen, text, sizeof text, NULL, 0, NI_NUMERICHOST);
                printf(" %s", text);
            }
        }
        printf("\n");
    }
}
"""
GLIBC = """
import socket, sys

for name in sys.argv[1:]:
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        infos = []
    print(name, *(info[4][0] for info in infos))
"""


@pytest.mark.parametrize("library", ["glibc", "musl"])
def test_getaddrinfo(tmp_path: Path, library: str) -> None:
    command = [sys.executable, "-c", GLIBC]
    if library == "musl":
        (tmp_path / "ask.c").write_text(MUSL)
        command = [str(tmp_path / "ask")]
        run("musl-gcc", "-static", "-o", command[0], str(tmp_path / "ask.c"))
    socket = tmp_path / "regd.sock"
    with DaemonProcess(tmp_path / "registry.json", "--unix", str(socket)) as process:
        process.start()
        with machine(f"unix://{socket}", tmp_path) as inside, blocking.Client(process.addresses[0]) as client:
            client.register("four", 5061, static=True)
            client.register("six", 5062, host="::1", static=True)
            client.register("both", 5063, instance="4", static=True)
            client.register("both", 5064, instance="6", host="::1", static=True)
            client.register("eu.shop", 5065, static=True)

            def addresses(name: str) -> set[str]:
                output = run(*command, f"{name}.regd.internal", before=inside)
                return set(output.split()[1:])

            block_until(lambda: addresses("eu.shop"))
            assert addresses("four") == {"127.0.0.1"}
            assert addresses("six") == {"::1"}
            assert addresses("both") == {"127.0.0.1", "::1"}
            assert addresses("7f000001-5061.addr") == {"127.0.0.1"}
            assert addresses("nobody") == addresses("shop") == set()
