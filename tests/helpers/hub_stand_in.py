"""A stand-in of the Hugging Face Hub: the part of its HTTP API that pushing and loading an adapter needs.

It lets the tests use the real client (`HF_ENDPOINT`, with `HF_HUB_DISABLE_XET=1`) without network. Repositories live
in memory, and failures are told to it beforehand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TRUNCATE = "truncate"  # a failure that is no status: the answer breaks off in the middle


class HubStandIn:
    """
    Attributes:
        repos: files by repository id and path, on the branch main. The id of a data set begins with "datasets/".
        branches: files by repository id and path of other branches, by (repository id, branch).
        next_repos: what repos is updated with when a client asks for /move, as if somebody pushed to them.
        private: tokens by repository id; without its token, a repository is not to be seen.
        failures: (regex of "METHOD /path", how); requests that match fail. How: a status; TRUNCATE; an address of
            another host to redirect to; or a number of seconds, as a float, to wait before the answer.
        requests: "METHOD /path" of all requests so far.
        sent: the number of bytes of each path that was asked for, as a whole or in ranges.
        tokens: what the requests had in their header "Authorization".
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.next_repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}  # the files of every commit that was ever named
        self.failures: list[tuple[str, int | str | float]] = []
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}
        self.tokens: list[str | None] = []
        self.uploads: dict[str, bytes] = {}  # large files that no commit has named yet, by sha256
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def client_environment(self, home) -> dict[str, str]:
        """The variables of a process that takes this for the Hub, with its cache in the folder `home`."""
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return environment | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_stand_in",
            "OMP_NUM_THREADS": "1",
        }

    def commit_id(self, repo_id: str, revision: str = "main") -> str | None:
        """The commit of a branch, or the commit itself; `None` if there is no such revision."""
        if revision not in self.commits and revision != "main":
            self.commit_id(repo_id)  # a commit that another host has named
        if revision in self.commits:
            return revision
        files = self.repos[repo_id] if revision == "main" else self.branches.get((repo_id, revision))
        if files is None:
            return None
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit

    def is_visible(self, repo_id: str, authorization: str | None) -> bool:
        token = self.private.get(repo_id)
        return repo_id in self.repos and (token is None or authorization == f"Bearer {token}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.hub.tokens.append(self.headers.get("Authorization"))
        failure = next((how for pattern, how in self.hub.failures if re.search(pattern, request)), None)
        self.truncated = failure == TRUNCATE
        self.other_host = failure if isinstance(failure, str) and failure.startswith("http") else None
        if isinstance(failure, float):
            time.sleep(failure)
        if isinstance(failure, int):
            return self._json({"error": f"stand-in answers {failure}"}, failure)
        for pattern, method in ROUTES.items():
            match = re.fullmatch(pattern, request)
            if match:
                return method(self, *match.groups())
        return self._json({"error": f"the stand-in has no {request}"}, 404)

    def _send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if self.truncated else content)
        self.close_connection = self.truncated

    def _json(self, answer, status: int = 200, **headers):
        self._send(json.dumps(answer).encode(), status, Content_Type="application/json", **headers)

    def heal(self):
        self.hub.failures = []
        self._json({})

    def move(self):
        self.hub.repos.update(self.hub.next_repos)
        self._json({})

    def create_repo(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = repo_id in self.hub.repos
        self.hub.repos.setdefault(repo_id, {})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}, 409 if known else 200)

    def whoami(self):
        self._json({"name": "me", "type": "user", "orgs": []})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---\n")[1])
        base = metadata.get("base_model", "some/model")
        valid = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
        errors = [] if valid else [{"message": f'"base_model" with value "{base}" is not valid.'}]
        self._json({"errors": errors, "warnings": []}, 200 if valid else 400)

    def preupload(self, repo_id, revision):
        files = json.loads(self.body)["files"]
        large = {path: path.endswith((".safetensors", ".bin")) for path in (file["path"] for file in files)}
        modes = [{"path": path, "uploadMode": "lfs" if large[path] else "regular"} for path in large]
        self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs_batch(self, repo_id):
        objects = json.loads(self.body)["objects"]
        upload = [{**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{o['oid']}"}}} for o in objects]
        self._json({"transfer": "basic", "objects": upload})

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self._json({})

    def commit(self, repo_id, revision):
        files = self.hub.repos[repo_id] if revision == "main" else self.hub.branches[repo_id, revision]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads.pop(value["oid"])
        commit = self.hub.commit_id(repo_id, revision)
        self._json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}"}
        )

    def create_branch(self, repo_id, branch):
        self.hub.branches.setdefault((repo_id, branch), dict(self.hub.repos[repo_id]))
        self._json({})

    def info(self, repo_id, revision=None):
        commit = self._commit(repo_id, revision or "main")
        if commit is None:
            return None
        siblings = [{"rfilename": path} for path in self.hub.commits[commit]]
        return self._json({"id": repo_id, "sha": commit, "siblings": siblings, "tags": []})

    def _commit(self, repo_id, revision):
        """The commit of a revision; without one, answers that there is none and returns `None`."""
        if not self.hub.is_visible(repo_id, self.headers.get("Authorization")):
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        commit = self.hub.commit_id(repo_id, revision)
        if commit is None:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        return commit

    def resolve(self, repo_id, revision, path):
        commit = self._commit(repo_id, revision)
        if commit is None:
            return None
        files = self.hub.commits[commit]
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[path]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.other_host is not None:
            linked = {"X_Linked_Etag": tag, "X_Linked_Size": str(len(content))}
            return self._send(b"", 302, Location=self.other_host + self.path, X_Repo_Commit=commit, **linked)
        headers = {"ETag": tag, "X_Repo_Commit": commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))  # resumed, or a head alone
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if "Range" in self.headers:
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + end + 1 - start
        return self._send(content[start : end + 1], 206 if "Range" in self.headers else 200, **headers)

    def tree(self, repo_id, revision, folder):
        commit = self._commit(repo_id, revision)
        if commit is None:
            return None
        prefix, is_recursive = f"{folder}/" if folder else "", "recursive=True" in self.path
        inside = [path for path in self.hub.commits[commit] if path.startswith(prefix)]
        rests = [path.removeprefix(prefix) for path in inside]
        folders = sorted({prefix + rest[: i.start()] for rest in rests for i in re.finditer("/", rest)})
        files = [self._entry(commit, path) for path in inside if is_recursive or "/" not in path.removeprefix(prefix)]
        shown = [name for name in folders if is_recursive or "/" not in name.removeprefix(prefix)]
        return self._json([*({"type": "directory", "path": name, "oid": "0" * 40} for name in shown), *files])

    def paths_info(self, repo_id, revision):
        commit = self._commit(repo_id, revision)
        if commit is None:
            return None
        asked = parse_qs(self.body.decode()) if b"{" not in self.body else json.loads(self.body)
        return self._json([self._entry(commit, path) for path in asked["paths"] if path in self.hub.commits[commit]])

    def _entry(self, commit, path):
        content = self.hub.commits[commit][path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
DATASET = rf"(datasets/{REPO[1:]}"
ROUTES = {
    "GET /heal": _Handler.heal,
    "GET /move": _Handler.move,
    "POST /api/repos/create": _Handler.create_repo,
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.validate_yaml,
    f"POST /api/models/{REPO}/preupload/{REVISION}": _Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"PUT /lfs/(\w+)": _Handler.lfs_put,
    f"POST /api/models/{REPO}/commit/{REVISION}": _Handler.commit,
    f"POST /api/models/{REPO}/branch/{REVISION}": _Handler.create_branch,
    f"GET /api/models/{REPO}(?:/revision/([^/]+))?": _Handler.info,
    f"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(.+)": _Handler.resolve,
    f"GET /api/{DATASET}(?:/revision/([^/]+))?": _Handler.info,
    f"GET /api/{DATASET}/tree/{REVISION}(?:/(.+))?": _Handler.tree,
    f"POST /api/{DATASET}/paths-info/{REVISION}": _Handler.paths_info,
    f"(?:GET|HEAD) /{DATASET}/resolve/{REVISION}/(.+)": _Handler.resolve,
}
