"""Sessions with nc of both kinds, telnet and curl."""

import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

REGISTER = r"""printf '{"cmd":"register","name":"db","port":5432}\n{"cmd":"resolve","name":"db"}\nquit\n' | %s 127.0.0.1 %d"""


def shell(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout


def need(tool: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    return tool


@pytest.mark.parametrize("tool", ["nc.openbsd", "nc.traditional"])
def test_netcat(process: DaemonProcess, tool: str) -> None:
    need(tool)
    lines = shell(REGISTER % (tool, process.port)).splitlines()
    assert len(lines) == 2
    assert '"port":5432' in lines[1]
    lines = shell(rf"printf 'resolve db\r\nlist\r\nquit\r\n' | {tool} 127.0.0.1 {process.port}").splitlines()
    assert len(lines) == 2
    assert all('"name":"db"' in line for line in lines)
    assert shell(f"""echo '{{"cmd":"ping"}}' | {tool} -w 1 127.0.0.1 {process.port}""") == '{"ok":true}\n'


def test_netcat_that_ends_its_side(process: DaemonProcess) -> None:
    need("nc.openbsd")
    assert shell(f"""echo '{{"cmd":"ping"}}' | nc.openbsd -N 127.0.0.1 {process.port}""") == '{"ok":true}\n'


def test_telnet(process: DaemonProcess) -> None:
    """telnet drops what it has not sent yet when its input ends, so its input stays open here, as a terminal's does."""
    with subprocess.Popen(
        [need("telnet"), "127.0.0.1", str(process.port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as telnet:  # fmt: skip
        assert telnet.stdin is not None
        assert telnet.stdout is not None
        telnet.stdin.write('{"cmd":"register","name":"db","port":5432}\r\nresolve db\r\nlist\r\nquit\r\n')
        telnet.stdin.flush()
        lines = [line for line in telnet.stdout if line.startswith("{")]
    assert len(lines) == 3
    assert all('"name":"db"' in line for line in lines)


def test_curl_is_refused(process: DaemonProcess) -> None:
    need("curl")
    done = subprocess.run(
        ["curl", "-sS", "-w", "%{http_code}", "-d", '{"cmd":"register","name":"evil","port":1}', f"http://127.0.0.1:{process.port}/"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert "This is regd" in done.stdout
    assert done.stdout.endswith("400")
    assert "evil" not in process.registry.read_text()
