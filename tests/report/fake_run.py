"""A made-up run folder that keeps the contract: twenty clients, every arm, tickets that follow the labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fedlth.storage.records import LedgerRow

LAYERS = (("conv1.weight", (6, 1, 5, 5)), ("conv2.weight", (16, 6, 5, 5)), ("fc1.weight", (64, 256)),
          ("fc2.weight", (10, 64)), ("fc2.bias", (10,)))  # fmt: skip
TARGETS = (0.5, 0.2, 0.1, 0.05)
MEANS: dict[str, tuple[float, ...]] = {
    "ticket": (0.878, 0.871, 0.846, 0.827),
    "one_shot": (0.877, 0.867, 0.839, 0.703),
    "global_mask": (0.871, 0.85, 0.805, 0.516),
    "ticket_0": (0.783, 0.799, 0.668, 0.568),
    "random": (0.796, 0.62, 0.5, 0.41),
}
DENSE = {"global": 0.672, "local": 0.817, "dense": 0.871, "dense_total": 0.874}
DENSE_BYTES = 80_000
LOST = {"kind": "refused", "reason": "not finite"}


def message(round: int, sender: str, receiver: str, payload_bytes: int, **values: Any) -> LedgerRow:
    """Return a ledger row; values replace what its other fields mostly are."""
    told: dict[str, Any] = {"phase": "federate", "kind": "values", "name": "theta_g", **values}
    return LedgerRow(round=round, sender=sender, receiver=receiver, payload_bytes=payload_bytes, **told)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labels_of(num_clients: int, rng: np.random.Generator) -> list[list[int]]:
    found = np.zeros((num_clients, 10), dtype=int)
    for client in range(num_clients):
        start = 2 * (client % 5)
        found[client, [start, (start + 1) % 10, (start + 3) % 10]] = rng.integers(30, 50, 3)
    return found.tolist()


def write_tickets(folder: Path, labels: list[list[int]], rng: np.random.Generator, *, structured: bool) -> list[str]:
    folder.mkdir()
    common = {name: rng.normal(size=shape) for name, shape in LAYERS}
    by_class = {name: rng.normal(size=(10, *shape)) for name, shape in LAYERS}
    hashes = []
    for client, counts in enumerate(labels):
        tensors, ticket = {}, f"{client + 1:016x}"
        for place, (name, shape) in enumerate(LAYERS):
            weights = 0.6 * rng.normal(size=shape) + common[name]
            if structured:
                weights = weights + np.tensordot(np.array(counts) / sum(counts), by_class[name], 1)
            if not name.endswith("bias"):
                kept = round((0.45, 0.3, 0.19, 0.5)[place] * weights.size)
                mask = np.zeros(weights.size, dtype=bool)
                mask[np.argsort(-np.abs(weights).ravel(), kind="stable")[:kept]] = True
                weights = weights * mask.reshape(shape)
                tensors[f"{name}_mask"] = np.packbits(mask)
            tensors[name] = weights.astype(np.float32)
        meta = {"format": "1", "study": "fake", "method": "two_step", "seed": "0", "client": str(client),
                "density": "0.2", "arm": "ticket", "ticket": ticket, "shapes": "{}"}  # fmt: skip
        save_file(tensors, folder / f"client-{client:04d}.safetensors", metadata=meta)
        hashes.append(ticket)
    return hashes


def ledger(num_clients: int, rounds: int, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[Any]]:
    rows: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []

    def row(round: int, phase: str, client: int, up: bool, kind: str, size: int, status: str = "ok") -> None:
        ends = (f"client:{client}", "server") if up else ("server", f"client:{client}")
        rows.append({"round": round, "phase": phase, "sender": ends[0], "receiver": ends[1], "kind": kind,
                     "name": f"theta_g@{round}", "payload_bytes": size, "framed_bytes": size + 40, "density": 1.0,
                     "ticket": "", "broadcast": not up, "status": status})  # fmt: skip

    for round in range(rounds):
        sampled = sorted(rng.choice(num_clients - 2, min(6, num_clients - 2), replace=False).tolist())
        for client in sampled:
            bad = round == 3 and client == sampled[0]
            row(round, "federate", client, False, "values", DENSE_BYTES)
            row(round, "federate", client, True, "values", DENSE_BYTES, "refused: not finite" if bad else "ok")
            row(round, "federate", client, True, "metrics", 60)
        told.append({"round": round, "phase": "federate", "clients": sampled, "up_bytes": 6 * (DENSE_BYTES + 60),
                     "down_bytes": 6 * DENSE_BYTES, "failed": [LOST | {"client": sampled[0]}] * (round == 3),
                     "val_accuracy": float(0.67 - 0.55 * np.exp(-round / 6) + rng.normal(0, 0.015))})  # fmt: skip
    for client in range(num_clients):
        row(rounds, "personalise", client, False, "values", DENSE_BYTES)
        row(rounds, "personalise", client, True, "mask", 2_600)
    return rows, told


def metrics(labels: list[list[int]], hashes: list[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    arms = [(arm, 1.0, mean) for arm, mean in DENSE.items()]
    arms += [(arm, target, mean) for arm, means in MEANS.items() for target, mean in zip(TARGETS, means, strict=True)]
    for client, counts in enumerate(labels):
        skill = rng.normal(0, 0.05)
        for arm, target, mean in arms:
            accuracy = float(np.clip(np.round((mean + skill + rng.normal(0, 0.02)) * 300) / 300, 0, 1))
            search = {"ticket": 15, "ticket_0": 15, "one_shot": 5, "dense_total": 0}.get(arm, 0)
            epochs = {"global": 0, "local": 15, "dense_total": 20}.get(arm, 5)
            rows.append({
                "client": client, "unseen": client >= len(labels) - 2, "arm": arm, "density": target,
                "target_density": target, "start": "theta_0" if arm in ("ticket_0", "local") else "theta_g",
                "epochs": epochs, "search_epochs": search, "train_flops": 1.2e9 * (epochs + search),
                "train_flops_effective": 1.2e9 * (epochs * target + search * (1 + target) / 2),
                "val_accuracy": min(1.0, accuracy + 0.004), "test_accuracy": accuracy, "val_loss": 0.4,
                "test_loss": 0.5, "num_train": int(sum(counts)), "num_val": 20, "num_test": 300,
                "ticket": hashes[client] if (arm, target) == ("ticket", 0.2) else "",
                "layer_density": dict.fromkeys(("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"), target),
            })  # fmt: skip
    return rows


def write_run(folder: Path, *, seed: int = 0, study: str = "fake", structured: bool = True, num_clients: int = 20,
              finished: bool = True, method: str = "two_step", rounds: int = 30) -> Path:  # fmt: skip
    """Write a whole run folder and return it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    labels = labels_of(num_clients, np.random.default_rng(77))
    hashes = write_tickets(folder / "tickets", labels, rng, structured=structured)
    rows, told = ledger(num_clients, rounds, rng)
    flops = {"conv1.weight": 172_800, "conv2.weight": 307_200, "fc1.weight": 32_768, "fc2.weight": 1_280}
    layers = [{"name": name, "shape": list(shape), "size": int(np.prod(shape)), "prunable": name in flops,
               "flops_per_example": flops.get(name, 0)} for name, shape in LAYERS]  # fmt: skip
    header = {
        "format": 1, "study": study, "method": method, "seed": seed, "engine": "inprocess",
        "versions": {"fedlth": "0.1.0", "torch": "2.9.0"}, "commit": "0123abc", "partition_digest": "ab" * 32,
        "data_digest": "cd" * 32, "num_clients": num_clients, "unseen": [num_clients - 2, num_clients - 1],
        "num_classes": 10, "client_labels": labels, "layers": layers,
        "num_parameters": sum(layer["size"] for layer in layers),  # type: ignore[misc]
        "num_prunable": sum(layer["size"] for layer in layers if layer["prunable"]),  # type: ignore[misc]
        "dense_payload_bytes": DENSE_BYTES, "dense_raw_bytes": DENSE_BYTES - 300,
        "flops_forward_per_example": sum(flops.values()), "finished": finished,
    }  # fmt: skip
    (folder / "header.json").write_text(json.dumps(header), encoding="utf-8")
    (folder / "config.yaml").write_text(f"study: {json.dumps(study)}\nmodel:\n  name: lenet5\n", encoding="utf-8")
    write_rows(folder / "ledger.jsonl", rows)
    write_rows(folder / "rounds.jsonl", told)
    write_rows(folder / "metrics.jsonl", metrics(labels, hashes, rng))
    write_rows(folder / "times.jsonl", [{"round": 0, "phase": "federate", "client": 1, "seconds": 0.5, "worker": "0"}])
    digests = {"theta_g": "ee" * 32, "tickets": {str(client): ticket for client, ticket in enumerate(hashes)}}
    (folder / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
    return folder
