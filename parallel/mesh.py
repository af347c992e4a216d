"""The mesh: how many ranks of each kind, refused in one sentence when it cannot be, and the process groups they form.

Ranks are numbered (pp, replicate, shard, cp, tp), tp fastest. Expert ranks are borrowed: the ranks of one pipeline
stage are also numbered (expert data, ep, etp), etp fastest, so that they cost no ranks of their own.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from models.limits import at_least
from parallel.ranks import Ranks, subgroup

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")
CONTEXTS = ("ulysses", "ring")
MOST_CHUNKS = 64
MOST_RANKS = 2**20  # more than any machine has, and few enough to look for the nearest mesh that works
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")
ONE_STAGE = ("gpipe", "1f1b")
V_SHAPED = ("zbv", "dualpipev")
TEXTS = ("hsdp", "schedule", "context", "stages")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism.

    dp: replicas. fsdp: ranks that share one copy of the parameters. hsdp: "RxS", the same as dp=R with fsdp=S. reshard:
    whether the parameters that FSDP gathers for a layer are freed after its forward pass and gathered again for its
    backward pass (ZeRO-3), or stay in between (ZeRO-2). tp: tensor and sequence. overlap: every tensor rank holds all
    tokens between branches, whose sums are under way beside other branches, under a residual that adds them later. cp:
    context. context: how its ranks mix along the sequence: ulysses exchanges heads for tokens around every mixer's
    core; ring leaves tokens in place, sends keys and values round, and states on. ep: experts, over ranks that the
    other degrees provide. etp: expert tensor, likewise: ranks that share an expert's width. ep_local: how many of those
    ranks (ep x etp) are on one machine, if rows are to be collected there before they go to other machines. ep_chunks:
    pieces in which rows travel to experts, one being computed while others are under way. pp: pipeline ranks. schedule:
    gpipe, 1f1b, interleaved, zero_bubble, zbv or dualpipev. stages: the number of layers of each pipeline stage, such
    as "3+5+5+3", in place of cuts by cost.
    """

    dp: int = 1
    fsdp: int = 1
    hsdp: str | None = None
    tp: int = 1
    cp: int = 1
    context: str = "ulysses"
    ep: int = 1
    etp: int = 1
    ep_local: int = 1
    ep_chunks: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    stages: str | None = None
    reshard: bool = True
    overlap: bool = False

    def __post_init__(self) -> None:
        degrees = ("dp", "fsdp", "tp", "cp", "ep", "etp", "pp")
        at_least(self, 1, *degrees, "ep_local", "ep_chunks")
        if self.ep_chunks > MOST_CHUNKS:
            raise ValueError(
                f"ep_chunks is {self.ep_chunks}; each piece costs an exchange of its own, and there are at most "
                f"{MOST_CHUNKS}; use fewer, such as 2"
            )
        if huge := [name for name in degrees if getattr(self, name) > MOST_RANKS]:
            raise ValueError(f"{huge[0]} is {getattr(self, huge[0])}; a mesh has at most {MOST_RANKS} ranks")
        if self.hsdp is not None:
            sizes = self.hsdp.split("x")
            if len(sizes) != 2 or not all(size.isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
                raise ValueError(f"hsdp is {self.hsdp!r}; write replicas x shards, such as 2x2")
            if self.dp != 1 or self.fsdp != 1:
                raise ValueError(f"hsdp={self.hsdp} already says dp and fsdp; leave those out")
        for name, kinds in (("schedule", SCHEDULES), ("context", CONTEXTS)):
            if getattr(self, name) not in kinds:
                near = difflib.get_close_matches(getattr(self, name), kinds, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{name} is {getattr(self, name)!r}; {hint}it is one of {', '.join(kinds)}")
        if self.context != "ulysses" and self.cp == 1:
            raise ValueError(f"context={self.context} is for context ranks, and cp is 1; leave it out, or give cp too")
        if self.schedule != "1f1b" and self.pp == 1:
            raise ValueError(
                f"schedule={self.schedule} is for pipeline ranks, and pp is 1; leave schedule out, or give pp too"
            )
        self._check_stages()
        self._check_experts()
        if not self.reshard and self.shard == 1:
            raise ValueError("reshard=false is about parameters that FSDP gathers, and fsdp is 1; leave it out")
        if self.world_size > MOST_RANKS:
            raise ValueError(f"the degrees multiply to {self.world_size} ranks; a mesh has at most {MOST_RANKS}")
        if self.stage_size % self.expert_ranks:
            one = "ep" if self.etp == 1 else "etp" if self.ep == 1 else "ep x etp"
            times = self.expert_ranks // math.gcd(self.expert_ranks, self.stage_size)
            more = f"hsdp={self.replicate * times}x{self.shard}" if self.hsdp else f"dp={self.dp * times}"
            fits = max(n for n in range(1, min(self.ep, self.stage_size) + 1) if self.stage_size % n == 0)
            less = f"{one}={fits if self.etp == 1 else 1}" if "x" not in one else "ep=1 and etp=1"
            raise ValueError(
                f"{one} is {self.expert_ranks}, which must divide dp x fsdp x cp x tp = {self.stage_size}, whose ranks "
                f"it borrows; use {less}" + (f", or {more}" if self.world_size * times <= MOST_RANKS else "")
            )

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        if self.pp == 1:
            raise ValueError(f"stages={self.stages} is for pipeline ranks, and pp is 1; leave it out, or give pp too")
        sizes = self.stages.split("+")
        if not all(size.isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
            raise ValueError(f"stages is {self.stages!r}; write the layers of each stage, one or more, such as 3+5")
        if len(sizes) != self.num_stages:
            each = "one" if self.num_stages == self.pp else "two"
            raise ValueError(
                f"stages={self.stages} says {len(sizes)} of them, and pp={self.pp} with schedule {self.schedule} has "
                f"{self.num_stages}, {each} per rank; give {self.num_stages} numbers, or leave stages out"
            )

    def _check_experts(self) -> None:
        for name in ("ep_local", "ep_chunks"):
            if getattr(self, name) > 1 and self.expert_ranks == 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and ep is 1: no rows travel; leave it out")
        if self.ep_local > 1 and (self.expert_ranks % self.ep_local or self.ep_local == self.expert_ranks):
            fits = [n for n in range(2, self.expert_ranks) if self.expert_ranks % n == 0]
            near = min(fits, key=lambda n: abs(n - self.ep_local), default=None)
            raise ValueError(
                f"ep_local is {self.ep_local}, and ep x etp is {self.expert_ranks}: that many ranks cannot be spread "
                f"over machines with {self.ep_local} each; {f'use {near}, or ' if near else ''}leave it out"
            )

    @property
    def num_stages(self) -> int:
        """Of the whole pipeline."""
        return self.pp if self.schedule in ONE_STAGE else 2 * self.pp

    @property
    def sizes(self) -> list[int] | None:
        """The layers of each stage, where they are given."""
        return None if self.stages is None else [int(size) for size in self.stages.split("+")]

    @property
    def expert_ranks(self) -> int:
        """Ranks that share a stage's experts."""
        return self.ep * self.etp

    @property
    def replicate(self) -> int:
        return int(self.hsdp.split("x")[0]) if self.hsdp else self.dp

    @property
    def shard(self) -> int:
        return int(self.hsdp.split("x")[1]) if self.hsdp else self.fsdp

    @property
    def stage_size(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp

    @property
    def world_size(self) -> int:
        return self.pp * self.stage_size

    def refuse_world(self, started: int) -> None:
        """Raise ValueError where another number of processes was started."""
        if started != self.world_size:
            raise ValueError(
                f"the mesh {self} takes {self.world_size} processes and {started} were started; start {self.world_size}"
            )

    @property
    def sequence_multiple(self) -> int:
        """What the length of a sequence is filled up to a multiple of: a ring's ranks have two stretches each."""
        return self.cp * self.tp * (2 if self.context == "ring" else 1)

    @property
    def stream_ranks(self) -> int:
        """Over how many ranks the tokens between branches are spread."""
        return self.cp if self.overlap else self.cp * self.tp

    @property
    def splits_backward(self) -> bool:
        return self.pp > 1 and self.schedule in SPLIT_BACKWARD

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """From "tp=2,pp=2,schedule=zbv". Data ranks that experts need and nothing else provides are added as
        dp."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, int | str | bool] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"mesh has no key {key!r}; {hint}the keys are {', '.join(fields)}")
            if key in values:
                raise ValueError(f"mesh gives {key} twice; give it once")
            if key in TEXTS:
                values[key] = value
            elif key in ("reshard", "overlap"):
                if value not in ("true", "false"):
                    raise ValueError(f"mesh has {key}={value!r}; it is true or false")
                values[key] = value == "true"
            elif value.isdecimal() and len(value) < 19:
                values[key] = int(value)
            else:
                raise ValueError(f"mesh has {key}={value!r}; it takes a whole number, such as {key}=2")
        if not values.keys() & {"dp", "fsdp", "hsdp"}:
            experts, rest = (
                math.prod(int(values.get(key, 1)) for key in keys) for keys in (("ep", "etp"), ("tp", "cp"))
            )
            if experts > 1 and rest > 0:
                values["dp"] = experts // math.gcd(experts, rest)
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        sizes = [
            f"{name}={getattr(self, name)}"
            for name in ("dp", "fsdp", "tp", "cp", "ep", "etp", "pp")
            if getattr(self, name) > 1
        ]
        if self.hsdp:
            sizes.insert(0, f"hsdp={self.hsdp}")
        if self.pp > 1:
            sizes.append(f"schedule={self.schedule}")
        sizes += [f"{name}={getattr(self, name)}" for name in ("ep_local", "ep_chunks") if getattr(self, name) > 1]
        if self.stages is not None:
            sizes.append(f"stages={self.stages}")
        if self.context != "ulysses":
            sizes.append(f"context={self.context}")
        if not self.reshard:
            sizes.append("reshard=false")
        if self.overlap:
            sizes.append("overlap=true")
        return ",".join(sizes) or "one process"


class Mesh:
    """The groups of one rank. All are made here, by all ranks together: made where one is first needed, a stage without
    experts would wait for ever for one that has some.

    tp, cp, pp: as named. ep: ranks that share experts, those of one expert's width side by side. data: ranks whose
    gradients of dense parameters add up (replicate x shard x cp). near_experts, far_experts: those of ep on this
    machine, and those in the same place on others. expert_data: the same for experts. sequence: ranks
    that share the sequence (cp x tp). stage: all of one pipeline stage. fsdp_mesh, expert_fsdp_mesh: over which FSDP
    shards, None without fsdp. timeout: of whatever ranks do together, torch's own if None.
    """

    def __init__(self, config: MeshConfig, device: str = "cpu", timeout: timedelta | None = None) -> None:
        self.config, self.device, self.etp, self.timeout = config, device, config.etp, timeout
        config.refuse_world(dist.get_world_size() if dist.is_initialized() else 1)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        pp, replicate, shard, cp, tp = config.pp, config.replicate, config.shard, config.cp, config.tp
        dense = (pp, replicate, shard, cp, tp)
        own = config.expert_ranks
        expert = (pp, config.stage_size // own, own)
        self.tp = self._ranks(dense, (4,))
        self.cp = self._ranks(dense, (3,))
        self.pp = self._ranks(dense, (0,))
        self.data = self._ranks(dense, (1, 2, 3))
        self.sequence = self._ranks(dense, (3, 4))
        self.stage = self._ranks(dense, (1, 2, 3, 4))
        self.ep = self._ranks(expert, (2,))
        self.expert_data = self._ranks(expert, (1,))
        machines = (pp, config.stage_size // own, own // config.ep_local, config.ep_local)
        two_level = config.ep_local > 1
        self.near_experts = self._ranks(machines, (3,)) if two_level else Ranks()
        self.far_experts = self._ranks(machines, (2,)) if two_level else Ranks()
        self.fsdp_mesh: DeviceMesh | None = None
        self.expert_fsdp_mesh: DeviceMesh | None = None
        if shard > 1:
            # Replicas stay replicas for experts too, unless experts' ranks themselves reach across them.
            replicas = replicate if config.stage_size // replicate % own == 0 else 1
            self.fsdp_mesh = self._device_mesh((pp, replicate, shard * cp, tp), 1, 2)
            experts = (pp, replicas, config.stage_size // replicas // own, own)
            self.expert_fsdp_mesh = self._device_mesh(experts, 1, 2)
        _, r, s, _, _ = (int(i) for i in torch.unravel_index(torch.tensor(self.rank), dense))
        self.data_rank, self.data_size = r * shard + s, replicate * shard

    @classmethod
    def single(cls, device: str = "cpu") -> "Mesh":
        return cls(MeshConfig(), device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _ranks(self, shape: tuple[int, ...], dims: tuple[int, ...]) -> Ranks:
        """The ranks that differ from this one in `dims` only, of a mesh of `shape`."""
        size = math.prod(shape[dim] for dim in dims)
        if size == 1:
            return Ranks()
        ranks = torch.arange(math.prod(shape)).view(shape)
        rest = [dim for dim in range(len(shape)) if dim not in dims]
        rows = ranks.permute(*rest, *dims).reshape(-1, size).tolist()
        row = next(row for row in rows if self.rank in row)
        return Ranks(size, row.index(self.rank), subgroup(rows, self.timeout))

    def pipeline_ranks(self, stages: Sequence[int]) -> Ranks:
        """The pipeline ranks `stages` among those that differ from this rank in pp only; all ranks of the mesh make
        their groups together.

        Alone if it is not one of them.
        """
        if len(stages) == 1:
            return Ranks()
        ranks = torch.arange(self.config.world_size).view(self.config.pp, -1)[list(stages)].T.tolist()
        mine = None
        for row in ranks:
            group = dist.new_group(row, timeout=self.timeout)
            if self.rank in row:
                assert isinstance(group, dist.ProcessGroup)
                mine = Ranks(len(row), row.index(self.rank), group)
        return mine or Ranks()

    def _device_mesh(self, shape: tuple[int, ...], replicate: int, shard: int) -> DeviceMesh:
        sharded = self._ranks(shape, (shard,))
        if shape[replicate] == 1:
            return DeviceMesh.from_group(self._alone(sharded), self.device, mesh_dim_names=("shard",))
        replicated = self._ranks(shape, (replicate,))
        at = [int(i) for i in torch.unravel_index(torch.tensor(self.rank), shape)]
        index: list[int | slice] = list(at)
        index[replicate] = index[shard] = slice(None)
        mesh = torch.arange(math.prod(shape)).view(shape)[tuple(index)]
        groups = [self._alone(replicated), self._alone(sharded)]
        return DeviceMesh.from_group(groups, self.device, mesh=mesh, mesh_dim_names=("replicate", "shard"))

    def _alone(self, ranks: Ranks) -> dist.ProcessGroup:
        """A real group even for one rank, which DeviceMesh needs."""
        if ranks.group is not None:
            return ranks.group
        return subgroup([[rank] for rank in range(dist.get_world_size())], self.timeout)
