"""The service over a real socket, in a process of its own, ended by a signal."""

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from jobs.report import main
from reports.access import check_host
from reports.schemas import SCHEMAS
from reports.service import run_service
from shortv.errors import Refused
from tests.reports.runs import make_sweep

REPOSITORY = Path(__file__).resolve().parents[3]
GIGABYTE = 10**9
CODE = """
import sys
from reports.service import run_service
say = lambda text: print(text, flush=True)
sys.exit(run_service(sys.argv[1], host=None, port=0, api_key_file=None, say=say))
"""


@contextmanager
def served(root: Path) -> Iterator[tuple[int, "subprocess.Popen[str]"]]:
    """A service of a root: its port and process."""
    command = [sys.executable, "-c", CODE, str(root)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            assert child.stdout is not None
            said = child.stdout.readline()
            assert "http://127.0.0.1:" in said, said + child.stdout.read()
            yield int(said.partition("127.0.0.1:")[2].partition("/")[0]), child
        finally:
            child.kill()


def resident(child: "subprocess.Popen[str]", field: str = "VmRSS") -> int:
    """Bytes that a process holds, or held at most (VmHWM)."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


def test_a_socket_a_download_and_a_signal(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    with served(tmp_path) as (port, child):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        client.request("GET", "/runs/a/tables/samples.parquet")
        response = client.getresponse()
        assert response.read() == (tmp_path / "a" / "samples.parquet").read_bytes()
        assert response.getheader("server") is None
        for path in ("/../../etc/passwd", "/runs/../../etc/passwd", "/runs/%2e%2e/%2e%2e/etc/passwd", "/runs/a/%00"):
            client.putrequest("GET", path)
            client.endheaders()
            found = client.getresponse()
            assert found.status == 404 and b"root:" not in found.read()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(b"GET /runs/\xff\xfe\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
        assert child.stdout is not None and child.stdout.read().endswith("stopped\n")


@pytest.mark.slow
def test_a_gigabyte_comes_in_constant_memory(tmp_path: Path) -> None:
    make_sweep(tmp_path / "a")
    path, schema = tmp_path / "a" / "samples.parquet", SCHEMAS["samples"]
    # Random prompts, which do not compress.
    prompts = [os.urandom(2**17).hex() for _ in range(64)]
    rows = [
        {"sample_id": f"s{row}", "prompt": prompt, "n_text": 1, "n_visual": 1} for row, prompt in enumerate(prompts)
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(GIGABYTE // 2**24):
            writer.write_table(table)
    with served(tmp_path) as (port, child):
        idle, size = 0, 0
        for name in ("errors", "samples"):
            idle, size = resident(child), 0
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            client.request("GET", f"/runs/a/tables/{name}.parquet")
            response = client.getresponse()
            assert response.status == 200
            while piece := response.read(2**18):
                size += len(piece)
        assert size == path.stat().st_size > 0.95 * GIGABYTE
        assert resident(child, "VmHWM") - idle < 100e6


def test_without_a_key_only_this_machine_is_served() -> None:
    assert check_host(None, with_key=False) == "127.0.0.1" and check_host(None, with_key=True) == "0.0.0.0"
    assert check_host("0.0.0.0", with_key=True) == "0.0.0.0" and check_host("::1", with_key=False) == "::1"
    for host in ("0.0.0.0", "10.0.0.1", "example.org", "::"):
        with pytest.raises(Refused, match="without a key"):
            check_host(host, with_key=False)


def test_an_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Refused, match="cannot be bound"):
        run_service(str(tmp_path), host=None, port=taken.getsockname()[1], api_key_file=None, say=print)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--serve", "ROOT", "--output", "x"], "leave them out with --serve"),
        (["--serve", "ROOT", "--against", "x"], "leave them out with --serve"),
        (["ROOT", "--port", "8080"], "need --serve"),
        (["--serve", "ROOT/a"], "is a run itself"),
        (["--serve", "ROOT", "--host", "0.0.0.0"], "without a key"),
        (["--serve", "ROOT", "--api-key-file", "ROOT/gone"], "cannot be read"),
    ],
)
def test_the_job_refuses_what_cannot_be(tmp_path: Path, arguments: list[str], why: str) -> None:
    make_sweep(tmp_path / "a")
    with pytest.raises((Refused, click.UsageError), match=why):
        main.main([item.replace("ROOT", str(tmp_path)) for item in arguments], standalone_mode=False)
