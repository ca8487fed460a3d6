"""A stand-in for the server of Weights & Biases: it takes what `wandb sync` sends, and keeps all of it.

    with WandbServer() as server:
        subprocess.run(["wandb", "sync", FOLDER], env={"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, ...})
        server.runs["abcd1234"].history

It answers what wandb 0.31 asks while it syncs, and of a run that is online. What else it is asked, as another version
of wandb may, stands in `server.unknown`.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote


@dataclass
class Run:
    """What was sent of one run."""

    id: str
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    project: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # without W&B's own part
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # of each streamed file, by line number
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


@dataclass
class Artifact:
    """What was sent of one artifact."""

    name: str
    type: str
    run: str
    metadata: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """Listens on a free port of this machine for as long as the context lasts."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._http.owner = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """What the server says to a request. Everything that it is sent arrives here."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with self._lock:
            if path == "/graphql":
                request = json.loads(body)
                return {"data": self._query(request["operationName"], request.get("variables") or {})}
            if parts[0] == "files" and parts[-1] == "file_stream":
                return self._stream(parts[-2], json.loads(body))
            if parts[0] == "upload" and method == "PUT":
                return self._upload(parts[1], parts[2], "/".join(parts[3:]), body)
            self.unknown.append(f"{method} {path}")
            return {}

    def _query(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "Viewer":
            someone = {"id": "someone", "entity": "someone", "username": "someone", "email": "", "flags": "{}"}
            return {"viewer": someone | {"teams": {"edges": []}}}
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": None}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "project", "name": given["project"], "bucket": self._resume(given["name"])}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(given), "inserted": True}}
        if operation == "CreateRunFiles":
            files = [self._target("run", given["run"], name) for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            artifact = {"id": self._create(given["input"]), "state": "PENDING"}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": {"latestArtifact": None}}}}
        if operation == "CreateArtifactFiles":
            files = [self._target("artifact", f["artifactID"], f["name"]) for f in given["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            key = given.get("artifactID") or given["artifactManifestID"]
            manifest = {"id": key, "file": self._target("manifest", key, "wandb_manifest.json")}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
        if operation == "CommitArtifact":
            self.artifacts[given["artifactID"]].committed = True
            return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
        self.unknown.append(operation)
        return {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(given["name"], Run(given["name"]))
        names = {
            "group": "groupName",
            "job_type": "jobType",
            "name": "displayName",
            "project": "project",
            "tags": "tags",
        }
        for attribute, key in names.items():
            if given[key]:
                setattr(run, attribute, given[key])
        values = {key: entry["value"] for key, entry in json.loads(given["config"] or "{}").items()}
        run.config |= {key: value for key, value in values.items() if key != "_wandb"}
        project = {"id": "project", "name": run.project, "entity": {"id": "entity", "name": "someone"}}
        return {"id": f"bucket-{run.id}", "name": run.id, "displayName": run.name, "project": project}

    def _resume(self, run_id: str) -> dict[str, Any] | None:
        """What a process must know that goes on with a run."""
        if (run := self.runs.get(run_id)) is None:
            return None
        counts = {f"{kind}LineCount": len(run.lines.get(f"wandb-{kind}.jsonl", ())) for kind in ("history", "events")}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]"}
        texts = {"summaryMetrics": json.dumps(run.summary), "config": "{}", "displayName": run.name, "tags": run.tags}
        return {"id": f"bucket-{run_id}", "name": run_id, "logLineCount": 0} | counts | tails | texts

    def _create(self, given: dict[str, Any]) -> str:
        key = f"artifact-{len(self.artifacts)}"
        self.artifacts[key] = Artifact(
            name=given["artifactCollectionName"],
            type=given["artifactTypeName"],
            run=given["runName"],
            metadata=json.loads(given["metadata"] or "{}"),
        )
        return key

    def _stream(self, run_id: str, sent: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        for name, part in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines |= dict(enumerate(part["content"], start=part["offset"]))
        run.exit_code = sent.get("exitcode", run.exit_code)
        return {}

    def _target(self, kind: str, owner: str, name: str) -> dict[str, Any]:
        """Where a file is to be sent."""
        url = f"{self.url}/upload/{kind}/{owner}/{quote(name)}"
        file = {"id": name, "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}
        return file | {"artifact": {"id": owner}}

    def _upload(self, kind: str, owner: str, name: str, body: bytes) -> dict[str, Any]:
        if kind == "run":
            self.runs[owner].files[name] = body
        elif kind == "artifact":
            self.artifacts[owner].files[name] = body
        else:
            self.artifacts[owner].manifest = json.loads(body)
        return {}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    owner: WandbServer

    def handle_error(self, *_: object) -> None:
        if not isinstance(error := sys.exc_info()[1], ConnectionError):  # wandb ends without saying goodbye
            self.owner.unknown.append(repr(error))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        answer = json.dumps(self.owner.answer(self.command, self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST
