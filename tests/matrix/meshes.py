"""The meshes of the matrix: every way of being parallel, alone and beside others."""

from parallel.mesh import MeshConfig

EVERYDAY = ("fsdp=2", "tp=2", "cp=2", "pp=2,schedule=zbv")
MESHES = (
    *EVERYDAY,
    "dp=2",
    "hsdp=2x2",
    "fsdp=2,reshard=false",
    "tp=4",
    "tp=2,overlap=true",
    "cp=4",
    "cp=2,tp=2",
    "cp=2,context=ring",
    "cp=4,context=ring",
    "cp=2,tp=2,context=ring",
    "ep=2,cp=2,context=ring",
    "fsdp=2,cp=2,context=ring",
    "cp=2,pp=2,schedule=zbv,context=ring",
    "pp=2,schedule=gpipe",
    "pp=2",
    "pp=4",
    "pp=2,stages=3+1",
    "pp=2,schedule=interleaved",
    "pp=2,schedule=zero_bubble",
    "pp=2,schedule=dualpipev",
    "tp=2,pp=2",
    "ep=2",
    "ep=2,tp=2",
    "ep=4,ep_local=2,ep_chunks=2",
    "ep=4,fsdp=4",
    "ep=2,fsdp=4",
    "etp=2",
    "ep=2,etp=2",
    "ep=2,etp=2,fsdp=4,reshard=false",
    "etp=2,tp=2,pp=2",
    "ep=2,pp=2",
    "ep=2,pp=2,schedule=zbv",
    "fsdp=2,ep=2,pp=2,schedule=interleaved",
    "fsdp=2,tp=2",
    "fsdp=2,cp=2",
    "fsdp=2,tp=2,pp=2",
    "fsdp=2,tp=2,pp=2,schedule=zbv",
    "fsdp=2,cp=2,pp=2,schedule=dualpipev",
    "hsdp=2x2,tp=2",
    "hsdp=2x2,ep=4",
    "dp=2,tp=2,pp=2,schedule=zero_bubble",
)


def family(mesh: MeshConfig) -> frozenset[str]:
    """The ways of being parallel that a mesh combines, such as {"fsdp", "tp"}. The data ranks that only lend experts
    their ranks are none of them; neither is the schedule that is the default."""
    names = {name for name in ("fsdp", "tp", "ep", "etp", "pp") if getattr(mesh, name) > 1}
    if mesh.hsdp:
        names.add("hsdp")
    elif mesh.dp > 1 and mesh.expert_ranks == 1:
        names.add("dp")
    if mesh.cp > 1:
        names.add(f"cp-{mesh.context}")
    if mesh.schedule != "1f1b":
        names.add(mesh.schedule)
    return frozenset(names)
