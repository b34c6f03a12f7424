from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: int | None
    cuda_arch_list: str

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
