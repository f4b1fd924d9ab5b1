"""The live report: a server on the loopback interface whose page follows the runs."""

import json
import re
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

from tests.commands import BackgroundCommand, run_command
from tests.pretrain.report.tiny_study import change_lines


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        return response.read().decode()


def status_of(url: str, **headers: str) -> int:
    try:
        get(url, **headers)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_the_live_page_follows_the_runs(study_with_values, tmp_path):
    study = study_with_values({"plain": {1: 0.70, 2: 0.69}, "other": {1: 0.70, 2: 0.69}})
    command = ["python", "launcher/report.py", str(study), "--live"]
    server = BackgroundCommand([*command, "0"], tmp_path / "log.txt")
    try:
        server.wait_until(lambda: "shows the report" in server.log.read_text(), "the address")
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", server.log.read_text())
        assert "reading the runs" in server.log.read_text()
        first = get(url)
        assert "0.6950" in first and 'http-equiv="refresh"' in first
        assert get(url) == first and server.log.read_text().count("rendered in") == 1
        results = study / "arm1-1" / "evaluation" / "results.jsonl"
        change_lines(results, lambda result: result["metrics"].update(exact=0.9))
        assert "0.7950" in get(url)
        complete = (study / "study.json").read_text()
        (study / "study.json").write_text("{")
        assert "study.json" in get(url)
        (study / "study.json").write_text(complete)
        assert "0.7950" in get(url)
        assert [status_of(url, Host="example.org:80"), status_of(url + "etc")] == [403, 404]
        port = url.strip("/").rpartition(":")[2]
        taken = run_command([*command, port], check=False)
        assert taken.returncode == 2 and f"cannot listen on port {port}" in taken.stderr
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", int(port))) != 0, "only 127.0.0.1 is bound"
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0
    finally:
        server.kill()


def test_the_address_is_shown_before_the_page_is_made_and_a_study_needs_no_torch(study_with_values, tmp_path):
    study = study_with_values({"plain": {1: 0.70}, "other": {1: 0.71}})
    planned = json.loads((study / "study.json").read_text())
    for arm in planned["arms"].values():
        arm["flops_per_token"] = 1.0e6
    (study / "study.json").write_text(json.dumps(planned))
    log = tmp_path / "log.txt"
    server = BackgroundCommand(["python", "launcher/report.py", str(study), "--live", "0"], log, cold=True)
    try:
        server.wait_until(lambda: "rendered in" in log.read_text(), "the first page")
        address, *_ = log.read_text().splitlines()
        assert address.startswith("http://127.0.0.1:") and address.endswith("reading the runs")
        assert "0.7100" in get(address.split()[0])
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    finally:
        server.kill()
