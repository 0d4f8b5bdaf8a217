"""The resident worker: a process that holds base model, space, data and theta of a run between a node's messages.

In deployment Flower starts a process for every message, which is too short-lived to hold a model. That process only
carries (`link`): it hands the message over a Unix socket (`wire`) to the worker of its run and device, and starts one
where there is none (`server`). What the worker holds and answers (`host`) is also what a process of Flower's simulation
holds, without a socket.

Only `host` imports torch.
"""

LOADED = "base model loaded: "  # in a worker's log, once for each that it reads
