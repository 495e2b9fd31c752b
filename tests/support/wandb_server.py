"""A W&B server on loopback, as far as a training run needs one: GraphQL and file streams into memory.

Written from the requests that wandb 0.31 makes. History is kept by offset, as the real one does; a resumed run is told
what is there.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

KEY = "a" * 40
"""Made up."""


class Stored:
    """One run on the server."""

    def __init__(self) -> None:
        self.lines: dict[int, str] = {}
        self.summary = "{}"
        self.upserts: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.files: set[str] = set()
        self.exit_code: int | None = None
        self.alerts: list[dict[str, Any]] = []
        self.preempting = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    def config(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for each in self.upserts:
            merged |= json.loads(each.get("config") or "{}")
        return {name: value["value"] for name, value in merged.items()}

    def given(self, name: str) -> Any:
        """The last value of a field of the run that a client has sent."""
        return next((each[name] for each in reversed(self.upserts) if each.get(name) is not None), None)


class WandbServer:
    """`url` answers while the block of `serving` runs. `refuses`: any key is wrong."""

    def __init__(self) -> None:
        self.runs: dict[str, Stored] = {}
        self.refuses = False
        self.artifacts: list[dict[str, Any]] = []
        self.sweep: dict[str, Any] = {}
        """The config of a sweep, as its YAML file has it."""
        self.trials: dict[str, dict[str, Any]] = {}
        """Those that no agent has yet: W&B run id -> parameters."""
        self.handed_out: dict[str, dict[str, Any]] = {}
        self.bodies: list[bytes] = []
        self.errors: list[str] = []
        """Requests that it does not understand."""
        self.url = ""

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        operation = query.get("operationName") or ""
        run = self.runs.get(str(variables.get("name") or variables.get("runName") or variables.get("run") or ""))
        if operation == "Viewer":
            viewer = {"id": "VXNlcg==", "entity": "me", "username": "me", "email": "me@here", "flags": "{}"}
            return {"viewer": None if self.refuses else {**viewer, "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "UA==", "name": variables["project"], "entity": {"id": "RQ==", "name": "me"},
                              "bucket": self._bucket(run, variables["name"]) if run else None}}  # fmt: skip
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Stored())
            run.upserts.append(variables)
            project = {"id": "UA==", "name": run.given("project") or "uncategorized",
                       "entity": {"id": "RQ==", "name": "me"}}  # fmt: skip
            bucket = {"id": "Qg==", "name": variables["name"], "displayName": run.given("displayName"),
                      "description": "", "config": run.given("config"), "sweepName": run.given("sweep"),
                      "project": project, "historyLineCount": len(run.lines)}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": len(run.upserts) == 1}}
        if operation == "CreateRunFiles" and run is not None:
            run.files |= set(variables["files"])
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert" and run is not None:
            run.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        return self._sweep_answer(query["query"], variables) or self._artifact_answer(operation, query)

    def _sweep_answer(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "query SweepWithRuns(" in text:
            sweep = {"id": "Uw==", "name": variables["sweep"], "method": "grid", "state": "RUNNING",
                     "config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}  # fmt: skip
            return {"project": {"sweep": sweep}}
        if "query GetSweepState(" in text:
            return {"project": {"sweep": {"state": "RUNNING"}}}
        if "createAgent(" in text:
            return {"createAgent": {"agent": {"id": "QWdlbnQ="}}}
        if "agentHeartbeat(" in text:
            commands = [] if json.loads(variables["runState"]) else [self._next_trial()]
            return {"agentHeartbeat": {"agent": {"id": "QWdlbnQ="}, "commands": json.dumps(commands)}}
        return {}

    def _artifact_answer(self, operation: str, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        if "query ArtifactType(" in query["query"]:
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables)
            artifact = {"id": "QQ==", "digest": "d", "state": "PENDING", "aliases": [],
                        "artifactSequence": {"id": "Uw==", "latestArtifact": None}}  # fmt: skip
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest":
            file = {
                "id": "Rg==",
                "name": "m",
                "displayName": "m",
                "uploadUrl": f"{self.url}/upload/m",
                "uploadHeaders": [],
            }
            return {"createArtifactManifest": {"artifactManifest": {"id": "TQ==", "file": file}}}
        if operation == "CreateArtifactFiles":
            names = [each["name"] for each in variables["input"]["artifactFiles"]]
            edges = [
                {
                    "node": {
                        "storagePath": name,
                        "uploadUrl": f"{self.url}/upload/{name}",
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": "QQ=="},
                    }
                }
                for name in names
            ]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "QQ==", "digest": "d"}}}
        return {}

    def _next_trial(self) -> dict[str, Any]:
        """One that was preempted is handed out again, as W&B does."""
        for name, run in self.runs.items():
            if run.preempting and run.exit_code:
                run.preempting, run.exit_code = False, None
                return {"type": "run", "run_id": name, "program": "", "args": self.handed_out[name]}
        if not self.trials:
            return {"type": "exit"}
        name, values = next(iter(self.trials.items()))
        del self.trials[name]
        self.handed_out[name] = {key: {"value": value} for key, value in values.items()}
        return {"type": "run", "run_id": name, "program": "", "args": self.handed_out[name]}

    def _bucket(self, run: Stored, name: str) -> dict[str, Any]:
        tail = [run.lines[max(run.lines)]] if run.lines else []
        return {
            "id": "Qg==", "name": name, "summaryMetrics": run.summary, "displayName": run.given("displayName"),
            "logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": len(run.events),
            "historyTail": json.dumps(tail), "eventsTail": json.dumps(run.events[-1:]), "config": run.given("config"),
            "tags": run.given("tags") or [], "notes": run.given("notes"), "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, part in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.lines |= {part["offset"] + number: line for number, line in enumerate(part["content"])}
            elif file == "wandb-summary.json":
                run.summary = part["content"][-1]
            elif file == "wandb-events.jsonl":
                run.events += part["content"]
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server on a free port of loopback."""
    store, lock = WandbServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            try:
                with lock:
                    store.bodies.append(body)
                    if self.path.startswith("/graphql"):
                        answer = {"data": store.answer(json.loads(body))}
                    elif self.path.endswith("/file_stream"):
                        store.stream(self.path.split("/")[-2], json.loads(body))
            except Exception as error:
                store.errors.append(f"{self.path}: {error!r}: {body[:2000]!r}")
            data = json.dumps(answer).encode()
            self.send_response(401 if store.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_request

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that is gone
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
