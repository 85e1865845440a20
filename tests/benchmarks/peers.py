"""The servers that one would take instead, from Debian's packages, each as it comes but for where it listens."""

from tests.benchmarks.servers import Server


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

    def command(self) -> list[str]:
        return [self.program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-u", "root", "-m", "1024"]

    def answers(self) -> bool:
        return self.ask(b"version\r\n", b"\r\n").startswith(b"VERSION")
