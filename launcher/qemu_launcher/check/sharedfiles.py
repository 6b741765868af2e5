"""Files of the guest's memory that other programs open too: ivshmem's, as Looking Glass has them. Pure, over a Tree."""

from collections.abc import Iterator

from ..sizes import format_size
from .asked import Backend
from .devices import udev_line
from .finding import Finding
from .hugepages import huge_page_of, mounts
from .tree import ENTER, READ, WRITE, Tree

_SHM = "/dev/shm"  # noqa: S108  where QEMU's documentation, and everybody, puts ivshmem files
_KVMFR = "/dev/kvmfr"


def shared_files(tree: Tree, wanted: list[Backend], user: str) -> Iterator[Finding]:
    """memory-backend-file outside hugetlbfs: exists, is large enough, is ours to write."""
    all_mounts = mounts(tree)
    for backend in wanted:
        if backend.path is None or backend.kind != "memory-backend-file" or huge_page_of(tree, backend, all_mounts):
            continue
        if backend.path.startswith(_KVMFR):
            yield from _kvmfr(tree, backend, user)
        elif not tree.is_directory(backend.path):
            yield from _shared_file(tree, backend, user)


def _shared_file(tree: Tree, backend: Backend, user: str) -> Iterator[Finding]:
    path, size = backend.path or "", backend.size
    about = f"memory file {path}"
    made = f"f {path} 0660 {user} kvm -"
    tmpfiles = f"echo '{made}' | sudo tee -a /etc/tmpfiles.d/qemu-memory.conf; sudo systemd-tmpfiles --create"
    state = tree.stat(path)
    if state is None:
        folder = path.rpartition("/")[0] or "."
        if not tree.may(folder, WRITE | ENTER):
            yield Finding("error", about, f"there is no {path}, and QEMU may not make it in {folder}", tmpfiles)
            return
        fix = f"if another user's program opens it: {tmpfiles}"
        yield Finding("note", about, f"there is no {path} yet; QEMU makes it, for you alone to write", fix)
    elif not tree.may(path, READ if backend.readonly else READ | WRITE):
        fix = f"remove it, if no VM uses it: sudo rm {path}; and have it made as yours: {tmpfiles}"
        yield Finding("error", about, f"{path} is not yours to read and write", fix)
    elif size is not None and 0 < state.st_size < size:
        fix = f"write size: {state.st_size}, or remove the file, if no VM uses it: rm {path}"
        text = f"{path} has {format_size(state.st_size)}, and the definition says {format_size(size)}"
        yield Finding("error", about, text, fix)
    else:
        yield Finding("ok", about, f"{path} is yours to use")
    free = tree.free_bytes(path.rpartition("/")[0] or ".")
    held = state.st_blocks * 512 if state is not None else 0
    if size is not None and free is not None and free + held < size:
        where = path.rpartition("/")[0]
        fix = f"sudo mount -o remount,size=... {_SHM}" if path.startswith(f"{_SHM}/") else "make room there"
        text = f"{where} has {format_size(free)} left, and {path} may take {format_size(size)}: the guest may die of it"
        yield Finding("warning", about, text, fix)


def _kvmfr(tree: Tree, backend: Backend, user: str) -> Iterator[Finding]:
    """Looking Glass's kernel module: a device that is memory of a fixed size."""
    path = backend.path or ""
    about = f"memory file {path}"
    if not tree.exists(path):
        size = -(-(backend.size or 32 << 20) >> 20)
        yield Finding(
            "error", about, f"there is no {path}", f"sudo modprobe kvmfr static_size_mb={size} (Looking Glass)"
        )
    elif not tree.may(path, READ | WRITE):
        rule = udev_line(f'SUBSYSTEM=="kvmfr", OWNER="{user}"', "/etc/udev/rules.d/70-qemu-kvmfr.rules", "kvmfr")
        yield Finding("error", about, f"{path} is not yours to read and write", rule)
    else:
        has = tree.text("/sys/module/kvmfr/parameters/static_size_mb") or ""
        index = path.removeprefix(_KVMFR)
        sizes = [int(word) for word in has.split(",") if word.isdigit()]
        if backend.size and index.isdigit() and int(index) < len(sizes) and 0 < sizes[int(index)] << 20 < backend.size:
            text = f"{path} has {sizes[int(index)]} MiB, and the definition says {format_size(backend.size)}"
            yield Finding(
                "error", about, text, f"write size: {sizes[int(index)]}M, or load kvmfr with a larger static_size_mb="
            )
        else:
            yield Finding("ok", about, f"{path} is yours to use")
