"""The fields of requests that contain a picture: base64 in JSON, a file in multipart/form-data."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field

PICTURE = "A PNG, JPEG, WebP or single-frame GIF file, as a file in multipart/form-data or as base64 in JSON."
Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]  # the type of a field with a picture


class Pictured(BaseModel):
    """The field of every request with one picture."""

    image: Annotated[Base64, Field(description=PICTURE)]


def multipart_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of a multipart body from the schema of the JSON body (OpenAPI 3.1, section 4.8.15).

    A picture in base64 becomes a file.
    """
    schema = json.loads(json.dumps(schema))
    for field in schema["properties"].values():
        picture = field.get("items", field)
        if picture.pop("contentEncoding", None) == "base64":
            picture["contentMediaType"] = "application/octet-stream"
    return schema
