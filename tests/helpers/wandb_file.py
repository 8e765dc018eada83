"""What W&B has of a run, by its own means: its protobufs in a run's file, and a server that `wandb sync` uploads to."""

import contextlib
import gzip
import json
import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protobuf


def folders(run: Path) -> list[Path]:
    """W&B's folders of a run, a resumed one has several."""
    return sorted((run / "wandb").glob("*run-2*"))


def read(folder: Path) -> dict[str, Any]:
    """`run`, `config`, `history` (rows), `summary`, `metric` (definitions by name), `exit`, and counts of the rest."""
    (file,) = folder.glob("*.wandb")
    made: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metric": {}, "exit": None, "count": {}}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        made["count"][kind] = made["count"].get(kind, 0) + 1
        if kind == "run":
            made["run"] = record.run
            put_all(made["config"], record.run.config.update)
        elif kind == "history":
            made["history"].append({})
            put_all(made["history"][-1], record.history.item)
        elif kind in ("config", "summary"):
            put_all(made[kind], getattr(record, kind).update)
        elif kind == "metric":
            made["metric"][record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            made["exit"] = record.exit.exit_code
    return made


def put_all(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *groups, key = item.nested_key or [item.key]
        inner = into
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[key] = json.loads(item.value_json)


def records(file: Path) -> Iterator[Any]:
    """W&B's records lie in LevelDB's log format: parts of them with a head of 7 bytes, in blocks of 32 KiB."""
    data, at, part = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = protobuf.Record()  # type: ignore[attr-defined]
            record.ParseFromString(part)
            part = b""
            yield record


class Server:
    """A W&B server as far as a run needs one. `bad`: status, answers nothing but it; `until`: gone after that query."""

    def __init__(self, bad: int | None = None, until: str = ""):
        self.bad, self.until, self.closed = bad, until, False
        self.runs: dict[str, dict[str, Any]] = {}  # by id: variables of its query, `history`, `summary`, `complete`
        self.uploaded: set[str] = set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.gone()

    def gone(self) -> None:
        self.closed = True
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            return {"data": self.query(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            run, sent = self.runs[path.split("/")[-2]], json.loads(body)
            for name, chunk in (sent.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    run["history"][chunk["offset"] :] = map(json.loads, chunk["content"])
                elif name == "wandb-summary.json":
                    run["summary"] = json.loads(chunk["content"][-1])
            run["exit"] = sent.get("exitcode") if sent.get("complete") else run["exit"]
        elif path.startswith("/up/"):
            self.uploaded.add(path.removeprefix("/up/"))
        return {}

    def query(self, text: str, given: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"(?:query|mutation)\s*(\w*)", text)[1]  # type: ignore[index]
        me, place = {"id": "e", "name": "me"}, {"id": "p", "name": given.get("project") or "project"}
        if name in ("", "Viewer"):
            fields = {"entity": "me", "username": "me", "email": "", "flags": "{}", "name": "me", "admin": False}
            return {"viewer": {"id": "me", "teams": {"edges": []}} | fields}
        if name == "RunResumeStatus":
            return {"model": place | {"entity": me, "bucket": self.bucket(given["name"])}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(given["name"], {"history": [], "summary": {}, "exit": None, "given": {}})
            run["given"] |= {key: value for key, value in given.items() if value is not None}
            bucket = {"id": "b", "name": given["name"], "displayName": run["given"].get("displayName"), "config": "{}"}
            bucket |= {"sweepName": None, "historyLineCount": 0, "project": place | {"entity": me}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "ArtifactType":
            return {"project": None}
        if name == "CreateArtifact":
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/up/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        tail = json.dumps([json.dumps(row) for row in run["history"][-1:]])
        lines = {"historyLineCount": len(run["history"]), "logLineCount": 0, "eventsLineCount": 0}
        texts = {"historyTail": tail, "eventsTail": "[]", "config": "{}", "wandbConfig": '{"t": {}}'}
        return {"id": "b", "name": name, "summaryMetrics": json.dumps(run["summary"]), "tags": []} | lines | texts


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if server.closed:
                self.close_connection = True
                return
            unknown = self.path.startswith("/sdk/")  # telemetry
            sent = json.dumps({} if server.bad or unknown else server.answer(self.path, body)).encode()
            self.send_response(server.bad or (404 if unknown else 200))
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)
            if server.until and server.until.encode() in body:
                server.until, server.closed = "", True
                threading.Thread(target=server.gone).start()

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

    return Handler
