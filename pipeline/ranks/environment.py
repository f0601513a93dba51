"""Which variables of the launching shell reach every rank on every host: the one list of them.

DeepSpeed 0.19.8 passes on what begins with MLFLOW, PYTHON, MV2 or UCX, and NCCL where the launching host has CUDA, all
of it on the command lines of ssh, where `ps` shows it to everybody. Here they go by a file that its owner alone may
read (handover.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

# As a shell would match them. More of them, for one launch: PIPELINE_ENVIRONMENT="MY_TOKEN SITE_*".
NAMES = (
    *("PIPELINE_*", "RENDEZVOUS_SECONDS"),  # this project's
    *("OMP_*", "MKL_*", "KMP_*", "OPENBLAS_*", "GOMP_*", "MALLOC_*"),  # threads and memory of the host
    *("CUDA_*", "PYTORCH_*", "TORCH_*", "TRITON_*", "DS_*", "DEEPSPEED_*"),
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_*", "TP_*", "UCX_*", "FI_*", "OFI_*", "RDMAV_*", "MV2_*"),  # the network
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "FTP_PROXY"),
    *("SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    "MLFLOW_*",
    *("AWS_*", "GOOGLE_*", "GCS_*", "CLOUDSDK_*", "AZURE_*", "FSSPEC_*", "HF_*", "WDS_*"),  # stores of data
    *("PYTHON*", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TZ"),
    *("LANG", "LC_*"),
)
# A launcher gives each rank its own.
_OF_ONE_RANK = {"CUDA_VISIBLE_DEVICES", "PIPELINE_ENVIRONMENT"}


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that every rank is to have."""
    patterns = [*NAMES, *environment.get("PIPELINE_ENVIRONMENT", "").replace(",", " ").split()]
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ONE_RANK and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
