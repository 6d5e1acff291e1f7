"""python tied.py COMMAND...: becomes COMMAND, which Linux ends (SIGTERM) when its parent dies; elsewhere just runs it.

For programs that are not ours and so cannot ask for it themselves. TENFOLD_PARENT, where set, is the parent's number:
a parent that died before the request could be made is noticed too.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = os.environ.get("TENFOLD_PARENT")
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if parent and os.getppid() != int(parent):
            sys.exit(143)  # as if the signal had come
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - becoming that program is the purpose


if __name__ == "__main__":
    main()
