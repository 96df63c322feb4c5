"""Who asks, by name, told to HTTP filters and endpoints: `x-forwarded-client-cert`, as Istio's proxies do.

What the kernel tells of a connection has the client's ids (contracts.handoff). A script in each HTTP chain,
before all other filters, looks them up among all principals of the mesh. Chains have it by its name alone, so
an account that comes changes no listener. What a client says in that header himself is gone before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from services.waypoint_mgr.envoy import Json, discovered, typed

FORWARD: Final = "pykmesh.io/forward-client-identity"
"""An annotation of the Gateway: "true" or "false"."""
SCRIPT: Final = "client-identity"
_KIND: Final = "filters.http.lua.v3.Lua"
_WRITABLE: Final = re.compile(r"[-A-Za-z0-9._/]+")
_LUA: Final = """
local names = {}
for id, name in string.gmatch([[%s]], "(%%x+) (%%S+)") do names[id] = name end

local function add(text, groups)
  for group in string.gmatch(text, "%%x+") do
    groups[#groups + 1] = string.format("%%04x", tonumber(group, 16))
  end
end

function envoy_on_request(handle)
  local info = handle:streamInfo()
  local told = string.match(info:downstreamLocalAddress(), "^%%[(.*)%%]")
  if not told then return end
  local before, after = string.match(told, "^(.-)::(.*)$")
  local groups, last = {}, {}
  add(before or told, groups)
  add(after or "", last)
  while #groups + #last < 8 do groups[#groups + 1] = "0000" end
  for _, group in ipairs(last) do groups[#groups + 1] = group end
  local name = names[table.concat(groups, "", 4)]
  if not name then return end
  handle:headers():replace("x-forwarded-client-cert", "URI=spiffe://" .. name)
  info:dynamicMetadata():set("pykmesh", "client_principal", name)
end
"""
"""The last five of the address's eight groups are the ids of namespace and account."""


def is_forwarded(annotations: Mapping[str, str]) -> bool:
    return annotations.get(FORWARD) == "true"


def misread(annotations: Mapping[str, str]) -> list[str]:
    said = annotations.get(FORWARD, "")
    return [] if said in ("", "true", "false") else [f"{FORWARD} is {said!r}: true or false"]


def in_chain() -> Json:
    return discovered(SCRIPT, _KIND)


def script(principals: Mapping[str, bytes]) -> Json:
    """The resource of that name. A principal that is no SPIFFE name is nobody's."""
    known = (f"{ids.hex()} {name}" for name, ids in sorted(principals.items()) if _WRITABLE.fullmatch(name))
    source = _LUA % "\n".join(known)
    return {"name": SCRIPT, "typedConfig": typed(_KIND) | {"defaultSourceCode": {"inlineString": source}}}
