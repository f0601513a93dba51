"""What tests ask of the S3 API that the fixture `s3` serves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ObjectStore:
    """A real S3 API on this machine, with one bucket named `bucket`."""

    environment: dict[str, str]
    client: Any

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=data)

    def digests(self, prefix: str) -> dict[str, str]:
        """SHA-256 of every object below the prefix, by the rest of its key."""
        listed = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
        return {
            entry["Key"].removeprefix(prefix): hashlib.sha256(
                self.client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
            ).hexdigest()
            for entry in listed
        }
