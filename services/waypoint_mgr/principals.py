"""Who asks, by name, told to HTTP filters and endpoints: `x-forwarded-client-cert`, as Istio's proxies do.

What the kernel tells of a connection has the client's ids (contracts.handoff). A script in each HTTP chain,
before all other filters, looks them up in a file that is sorted by them: a chain has no names, so neither its
memory nor what is configured grows with those of the mesh. What a client says there himself is removed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pykmesh.files import write_whole
from services.waypoint_mgr.envoy import Json, named, typed

FORWARD: Final = "pykmesh.io/forward-client-identity"
"""An annotation of the Gateway: "true" or "false"."""
HEADER: Final = "x-forwarded-client-cert"
_NAME: Final = re.compile(r"[-A-Za-z0-9._/]+")
_SPELLINGS: Final = [
    "".join(parts)
    for parts in itertools.product(("x",), "-_", ("forwarded",), "-_", ("client",), "-_", ("cert",))
    if "_" in parts
]
"""Which are the same header to servers that make variables of them."""
_LUA: Final = """
local known, count, since = {}, 0, 0

local function add(text, groups)
  for group in string.gmatch(text, "%x+") do
    groups[#groups + 1] = string.format("%04x", tonumber(group, 16))
  end
end

-- The last five of the eight groups of what was told: namespace and account.
local function ids(told)
  local before, after = string.match(told, "^(.-)::(.*)$")
  local groups, last = {}, {}
  add(before or told, groups)
  add(after or "", last)
  while #groups + #last < 8 do groups[#groups + 1] = "0000" end
  for _, group in ipairs(last) do groups[#groups + 1] = group end
  return table.concat(groups, "", 4)
end

-- The first line that begins at a place, or after it.
local function line_at(file, place)
  file:seek("set", place > 0 and place - 1 or 0)
  if place > 0 then file:read("*l") end
  return file:read("*l")
end

local function look_up(id)
  local file = io.open([==[PATH]==], "rb")
  if not file then return nil end
  local low, high = 0, file:seek("end")
  while low < high do
    local middle = math.floor((low + high) / 2)
    local line = line_at(file, middle)
    if line and string.sub(line, 1, #id) < id then low = middle + 1 else high = middle end
  end
  local line = line_at(file, low)
  file:close()
  if not line or string.sub(line, 1, #id) ~= id then return nil end
  return string.match(string.sub(line, #id + 2), "^[-%w._/]+$")
end

function envoy_on_request(handle)
  local info, headers = handle:streamInfo(), handle:headers()
  for _, name in ipairs({SPELLINGS}) do headers:remove(name) end
  local told = string.match(info:downstreamLocalAddress(), "^%[(.*)%]")
  if not told then return end
  if math.abs(os.time() - since) > 5 or count > 4096 then known, count, since = {}, 0, os.time() end
  local id = ids(told)
  if known[id] == nil then known[id], count = look_up(id) or false, count + 1 end
  if not known[id] then return end
  headers:replace("HEADER", "URI=spiffe://" .. known[id])
  info:dynamicMetadata():set("pykmesh", "client_principal", known[id])
end
""".replace("HEADER", HEADER).replace("SPELLINGS", ", ".join(f'"{name}"' for name in _SPELLINGS))


def is_identity(name: str) -> bool:
    """Of a header: it says who asks, which no route or token may say."""
    return name.lower().replace("_", "-") == HEADER


def is_forwarded(annotations: Mapping[str, str]) -> bool:
    return annotations.get(FORWARD) == "true"


def misread(annotations: Mapping[str, str]) -> list[str]:
    said = annotations.get(FORWARD, "")
    return [] if said in ("", "true", "false") else [f"{FORWARD} is {said!r}: true or false"]


def script(names: Path) -> Json:
    """The filter of a chain."""
    source = {"inlineString": _LUA.replace("PATH", str(names))}
    return named("envoy.filters.http.lua", typed("filters.http.lua.v3.Lua") | {"defaultSourceCode": source})


def write(names: Path, principals: Mapping[str, bytes]) -> list[str]:
    """Makes the file say these, at once and whole. Raises OSError.

    Returns the names that nobody has: those that are no SPIFFE names, or whose ids are another's too.
    """
    times = Counter(principals.values())
    left_out = [name for name, ids in principals.items() if times[ids] > 1 or not _NAME.fullmatch(name)]
    kept = principals.keys() - left_out
    lines = sorted(f"{principals[name].hex()} {name}\n" for name in kept)
    content = "".join(lines).encode()
    if not names.exists() or names.read_bytes() != content:
        write_whole(names, content)
    return sorted(left_out)
