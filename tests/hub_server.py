"""A small Hub on 127.0.0.1: the part of its HTTP API that pushes, downloads and lists model repositories.

Large files go by LFS (the client's Xet path is off with `HF_HUB_DISABLE_XET=1`). A file of 1 MB or more, or a
safetensors file, is large. Faults are asked for by attribute: each happens once. Pushes are made by processes of their
own, for the client reads its environment when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

import diffusers_dod


SOURCE = str(Path(diffusers_dod.__file__).parents[1])
TOKEN = "hf_of_the_test"
MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


class File(NamedTuple):
    oid: str  # of git for a small file, sha256 for a large one
    content: bytes
    is_large: bool


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        listing = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {branch}\n{listing}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.endpoint`; `hub.requests` lists what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.cut_upload = False  # the connection closes in the middle of the next large upload
        self.cut_download = False  # the connection closes in the middle of the next large download
        # By the name of a route's action: the statuses of its next answers; `None` closes the connection instead.
        self.faults: dict[str, list[int | None]] = {}
        self.gate = threading.Event()  # commits wait while it is not set
        self.gate.set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """The variables of a process whose Hub this is, with its cache in `home`."""
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return environment | {"PYTHONPATH": SOURCE, "no_proxy": "127.0.0.1"} | variables

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Puts files into a repository as somebody else's push would; returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        entries = dict(repository.commits[repository.branches["main"]])
        for path, content in files.items():
            is_large = path.endswith((".safetensors", ".bin"))
            oid = hashlib.sha256(content).hexdigest() if is_large else git_oid(content)
            entries[path] = File(oid, content, is_large)
        return repository.commit("main", entries)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {path: file.content for path, file in repository.commits[repository.resolve(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, {"error": message}, headers)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def is_signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_request(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.server.requests.append(f"{self.command} {path}")
        for pattern, action in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match is None:
                continue
            arguments = match.groupdict()
            with self.server.lock:
                if faults := self.server.faults.get(action):
                    self.body()
                    status = faults.pop(0)
                    return self.hang_up() if status is None else self.refuse(status, "Fault", "This Hub is broken")
                if self.command in ("POST", "PUT") and not self.is_signed_in() and "upload" not in action:
                    self.body()
                    return self.refuse(401, "Unauthorized", "Invalid username or password.")
                if "repo" in arguments:
                    repository = self.server.repositories.get(arguments.pop("repo"))
                    if repository is None or (repository.private and not self.is_signed_in()):
                        self.body()
                        return self.refuse(401, "RepoNotFound", "Repository not found")
                    arguments["repository"] = repository
                    if arguments.get("revision") and action != "create_branch":
                        if repository.resolve(arguments["revision"]) is None:
                            self.body()
                            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return getattr(self, action)(**arguments)
        self.body()
        self.refuse(404, "NotFound", f"This small Hub has no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # Repositories

    def whoami(self):
        if not self.is_signed_in():
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        self.answer(200, {"type": "user", "name": "user", "orgs": []})

    def create_repository(self):
        asked = json.loads(self.body())
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[repo_id] = Repository(bool(private))
        self.answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repository: Repository, revision: str):
        asked = json.loads(self.body() or b"{}")
        if revision in repository.branches:
            return self.refuse(409, "Conflict", "Reference already exists")
        repository.branches[revision] = repository.resolve(asked.get("startingPoint") or "main")
        self.answer(200, {})

    def refs(self, repository: Repository):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.branches.items()
        ]
        self.answer(200, {"branches": branches, "tags": [], "converts": []})

    def info(self, repository: Repository, revision: str | None = None):
        sha = repository.resolve(revision or "main")
        names = {id(other): name for name, other in self.server.repositories.items()}
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        repo_id = names[id(repository)]
        self.answer(
            200,
            {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "tags": []}
            | {"siblings": siblings, "downloads": 0, "likes": 0},
        )

    def entries(self, files: dict[str, File]) -> list[dict]:
        listing = []
        for path, file in files.items():
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            if file.is_large:
                entry["oid"] = git_oid(file.oid.encode())
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            listing.append(entry)
        return listing

    def tree(self, repository: Repository, revision: str, folder: str | None = None):
        files = repository.commits[repository.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        self.answer(200, self.entries({path: file for path, file in files.items() if path.startswith(prefix)}))

    def paths_info(self, repository: Repository, revision: str):
        asked = json.loads(self.body())
        files = repository.commits[repository.resolve(revision)]
        self.answer(200, self.entries({path: files[path] for path in asked["paths"] if path in files}))

    # Pushing

    def validate_yaml(self):
        content = json.loads(self.body())["content"]
        try:
            yaml.safe_load(content.split("---")[1])
            self.answer(200, {"errors": [], "warnings": []})
        except (yaml.YAMLError, IndexError) as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})

    def preupload(self, repository: Repository, revision: str):
        present = repository.commits[repository.resolve(revision)]
        files = []
        for file in json.loads(self.body())["files"]:
            is_large = file["path"].endswith(".safetensors") or file["size"] >= 1_000_000
            oid = present[file["path"]].oid if file["path"] in present else None
            files.append({"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "oid": oid})
            files[-1]["shouldIgnore"] = False
        self.answer(200, {"files": files})

    def lfs_batch(self, repository: Repository):
        objects = []
        for asked in json.loads(self.body())["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.large:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs-upload/{asked['oid']}"}}
            objects.append(entry)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode(), headers)

    def lfs_upload(self, oid: str):
        if self.server.cut_upload:
            self.server.cut_upload = False
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.hang_up()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, b"the content is not what its name says")
        self.server.large[oid] = content
        self.answer(200)

    def commit(self, repository: Repository, revision: str):
        lines = [json.loads(line) for line in self.body().splitlines()]
        self.server.gate.wait(20)
        files = dict(repository.commits[repository.resolve(revision)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(git_oid(content), content, False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self.refuse(400, "BadRequest", f"{value['path']} was not uploaded")
                files[value["path"]] = File(value["oid"], self.server.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"success": True}
        branch = revision
        if self.query.get("create_pr"):
            number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            branch, names = f"refs/pr/{number}", {id(r): name for name, r in self.server.repositories.items()}
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{names[id(repository)]}/discussions/{number}"
        sha = repository.commit(branch, files)
        self.answer(200, answer | {"commitOid": sha, "commitUrl": f"{self.server.endpoint}/user/repo/commit/{sha}"})

    # Downloading

    def resolve(self, repository: Repository, revision: str, file: str):
        sha = repository.resolve(revision)
        found = repository.commits[sha].get(file)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if found is None:
            return self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{found.oid}"'
        content, status = found.content, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            content, status = content[start:stop], 206
        if self.command == "GET" and found.is_large and self.server.cut_download:
            self.server.cut_download = False
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self.hang_up()
        self.answer(status, content, headers)


REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create_repository"),
    ("POST /api/validate-yaml", "validate_yaml"),
    (f"GET {MODEL}", "info"),
    (f"GET {MODEL}/revision/{REVISION}", "info"),
    (f"GET {MODEL}/tree/{REVISION}(/(?P<folder>.+))?", "tree"),
    (f"POST {MODEL}/paths-info/{REVISION}", "paths_info"),
    (f"GET {MODEL}/refs", "refs"),
    (f"POST {MODEL}/branch/{REVISION}", "create_branch"),
    (f"POST {MODEL}/preupload/{REVISION}", "preupload"),
    (f"POST {MODEL}/commit/{REVISION}", "commit"),
    (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs-upload/(?P<oid>\w+)", "lfs_upload"),
    (rf"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/{REVISION}/(?P<file>.+)", "resolve"),
]
