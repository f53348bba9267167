"""Files of Linux that say how much memory is free, and how much that is; both hosts are held to them."""

from __future__ import annotations

MEMINFO = {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/jobs/one\n",
    "sys/fs/cgroup/jobs/one/memory.max": "max\n",
    "sys/fs/cgroup/jobs/one/memory.current": "900000\n",
    "sys/fs/cgroup/jobs/memory.max": "2000000\n",
    "sys/fs/cgroup/jobs/memory.current": "1500000\n",
    "sys/fs/cgroup/jobs/memory.stat": "anon 1\ninactive_file 200000\n",
}
V1 = {
    "proc/self/cgroup": "4:cpu,memory:/docker/abc\n1:cpuset:/\n",  # the path of the host, not there in a container
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\n",
}


FREE_MEMORY = [
    ({}, None),
    (MEMINFO, 3000 * 1024),
    (MEMINFO | V2, 2000000 - 1500000 + 200000),
    (MEMINFO | V1, 1000000 - 400000 + 100000),
    (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 3000 * 1024),
    (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n"}, 0),
]
