"""A QEMU that refuses every question on its private monitor, for what a real one cannot be made to do. A `binary:`."""

import json
import re
import socket
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    configuration = Path(argv[argv.index("-readconfig") + 1]).read_text()
    found = re.search(r'fd = "([0-9]+)"', configuration)
    assert found is not None
    with socket.socket(fileno=int(found[1])) as monitor, monitor.makefile("rw") as file:

        def say(**members: object) -> None:
            file.write(json.dumps(members) + "\n")
            file.flush()

        say(QMP={})
        for line in file:
            request = json.loads(line)
            if request["execute"] in ("qmp_capabilities", "quit"):
                say(**{"return": {}, "id": request["id"]})
            else:
                say(error={"class": "GenericError", "desc": "it is a secret"}, id=request["id"])
            if request["execute"] == "quit":
                return


if __name__ == "__main__":
    main(sys.argv)
