"""MLflow's own server with faults: python faulty_server.py PORT FOLDER.

It reads FOLDER/fault.json before every request:
{"slow": seconds before every answer, "hang": true, "late": [part of the path, seconds between doing and answering],
"refuse": text in a batch of values that is answered with a refusal, "error": true for status 500}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
os.environ |= {
    "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{FOLDER}/mlflow.db",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(FOLDER / "artifacts"),
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

from mlflow.server import app  # noqa: E402
from werkzeug.serving import WSGIRequestHandler, run_simple  # noqa: E402

real = app.wsgi_app


def faulty(environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
    fault = json.loads((FOLDER / "fault.json").read_text())
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = BytesIO(body)
    while fault.get("hang"):
        time.sleep(0.2)
        fault = json.loads((FOLDER / "fault.json").read_text())
    time.sleep(fault.get("slow", 0))
    with open(FOLDER / "requests", "a") as f:
        f.write(environ["PATH_INFO"] + "\n")
    if fault.get("error"):
        respond("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b"out of order"]
    if "refuse" in fault and environ["PATH_INFO"].endswith("log-batch") and fault["refuse"].encode() in body:
        respond("400 Bad Request", [("Content-Type", "application/json")])
        return [json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not in this house"}).encode()]
    answer = list(real(environ, respond))
    part, seconds = fault.get("late", ("nothing", 0))
    if part in environ["PATH_INFO"]:
        time.sleep(seconds)
    return answer


class Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


app.wsgi_app = faulty
run_simple("127.0.0.1", PORT, app, threaded=True, request_handler=Quiet)
