"""The servers to compare with, from Debian's packages, in their default configuration except for the address."""

import json
from pathlib import Path
from typing import ClassVar

from tests.benchmarks.servers import Server
from tests.support.ports import free_port


class Redis(Server):
    label, protocol, program = "Redis", "redis", "redis-server"

    def command(self) -> list[str]:
        kept = ["yes", "--appendfsync", "always"] if self.durable else ["no"]
        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        return [self.program, *place, "--save", "", "--appendonly", *kept]

    def answers(self) -> bool:
        return self.ask(b"PING\r\n", b"\r\n") == b"+PONG\r\n"


class Memcached(Server):
    label, protocol, program = "memcached", "memcached", "memcached"
    connections_max = 1_000

    def command(self) -> list[str]:
        return [self.program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-u", "root", "-m", "1024"]

    def answers(self) -> bool:
        return self.ask(b"version\r\n", b"\r\n").startswith(b"VERSION")


class Nats(Server):
    """A bucket of its key-value store, in a file. By default it does not sync each write."""

    label, protocol, program = "NATS", "nats", "nats-server"

    def command(self) -> list[str]:
        return [self.program, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder)]

    def answers(self) -> bool:
        return self.ask(b"PING\r\n", b"PONG\r\n").startswith(b"INFO")

    def prepare(self) -> None:
        """Create the bucket, as its clients do."""
        bucket = {
            "name": "KV_services",
            "subjects": ["$KV.services.>"],
            "storage": "file",
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "allow_direct": True,
            "num_replicas": 1,
        }
        body = json.dumps(bucket).encode()
        reply = self.ask(
            b'CONNECT {"verbose":false}\r\nSUB made 1\r\n'
            + b"PUB $JS.API.STREAM.CREATE.KV_services made %d\r\n%s\r\n" % (len(body), body),
            b'"did_create":true',
        )
        assert b'"did_create":true' in reply, reply


class Zookeeper(Server):
    """A single server. By default it syncs its files before it answers."""

    label, protocol, program = "ZooKeeper", "zookeeper", "java"
    connections_max = 60
    jar: ClassVar[Path] = Path("/usr/share/java/zookeeper.jar")

    @classmethod
    def missing(cls) -> str:
        return super().missing() or ("" if cls.jar.exists() else "zookeeper")

    def command(self) -> list[str]:
        (self.folder / "zoo.cfg").write_text(
            f"tickTime=2000\ndataDir={self.folder}\nclientPort={self.port}\nclientPortAddress=127.0.0.1\n"
            "admin.enableServer=false\n"
        )
        (self.folder / "log4j.properties").write_text("log4j.rootLogger=OFF\n")
        main = "org.apache.zookeeper.server.ZooKeeperServerMain"
        return [self.program, "-cp", f"{self.folder}:{self.jar}", main, str(self.folder / "zoo.cfg")]

    def answers(self) -> bool:
        return self.ask(b"srvr", b"Mode").startswith(b"Zookeeper version")


class Etcd(Server):
    """A single member. By default it syncs its log before it answers."""

    label, protocol, program = "etcd", "etcd", "etcd"

    def command(self) -> list[str]:
        ours, theirs = (f"http://127.0.0.1:{port}" for port in (self.port, free_port()))
        flags = {
            "data-dir": str(self.folder / "data"),
            "listen-client-urls": ours,
            "advertise-client-urls": ours,
            "listen-peer-urls": theirs,
            "initial-advertise-peer-urls": theirs,
            "initial-cluster": f"default={theirs}",
            "logger": "zap",
            "log-level": "error",
        }
        return [self.program, *(f"--{flag}={value}" for flag, value in flags.items())]

    def answers(self) -> bool:
        return b'"health":"true"' in self.ask(b"GET /health HTTP/1.0\r\n\r\n", b"}")


class Epmd(Server):
    """Erlang's registry of nodes. An open connection holds a name."""

    label, protocol, program = "epmd", "epmd", "epmd"
    held = True
    names_max = 900  # each name is a connection, and epmd accepts about 1,000

    def command(self) -> list[str]:
        return [self.program, "-port", str(self.port), "-address", "127.0.0.1"]

    def answers(self) -> bool:
        return len(self.ask(b"\x00\x01n", b"name:")) >= 4
