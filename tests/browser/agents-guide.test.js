// The guide of users' agents, followed as a reader does: its blocks are saved and run as they are, each agent with each caller.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { binary, freePort, root } from "./machines.js";

const folder = mkdtempSync(join(tmpdir(), "wsproxy-guide-"));
// An environment of Python knows its packages by the path of its program.
const path = [join(folder, "bin"), join(root, "examples/fastapi-agents/.venv/bin"), process.env.PATH].join(":");
const guide = readFileSync(join(root, "docs/guides/agents.md"), "utf8");
let port;

/** The one block of a language that holds a word, with a free port in place of the gateway's. */
function block(language, word) {
  const blocks = [...guide.matchAll(/^```(\w+)\n(.*?)^```/gms)].filter(([, name, text]) => name === language && text.includes(word));
  assert.equal(blocks.length, 1, `blocks of ${language} with ${word}`);
  return blocks[0][2].replaceAll("8080", port);
}

before(async () => {
  port = String(await freePort());
  mkdirSync(join(folder, "bin"));
  mkdirSync(join(folder, "node_modules/@wsproxy"), { recursive: true });
  symlinkSync(binary, join(folder, "bin/wsproxy"));
  symlinkSync(process.execPath, join(folder, "bin/node"));
  symlinkSync(join(root, "clients/js"), join(folder, "node_modules/@wsproxy/client"));
  symlinkSync(join(root, "clients/js/node_modules/ws"), join(folder, "node_modules/ws"));
  for (const [name, language] of [["agent.py", "python"], ["call.py", "python"], ["agent.mjs", "js"], ["call.mjs", "js"]]) {
    writeFileSync(join(folder, name), block(language, name));
  }
});

after(() => rmSync(folder, { recursive: true, force: true }));

/** What bash prints for these lines, and then ends with all that they started. */
async function shell(lines) {
  const script = join(folder, "script");
  writeFileSync(script, ["set -e", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT", ...lines].join("\n"));
  const env = { PATH: path, HOME: folder, PORT: port, WSPROXY_SERVER__BIND: "127.0.0.1", PYTHONDONTWRITEBYTECODE: "1" };
  const options = { cwd: folder, env, timeout: 60_000 };
  return promisify(execFile)("bash", [script], options).catch((error) => { throw new Error(`${error.message}\n${error.stdout}`); });
}

// Healthy, and not only ready: the database is opened in the background.
const gateway = () => [block("sh", "wsproxy serve"), `until curl -sf http://localhost:${port}/health >/dev/null; do sleep 0.1; done`];
const hello = 'echo "Hello from this machine." > hello.txt';
const api = `curl -sS -H "Authorization: Bearer $WSPROXY_API__KEYS" http://localhost:${"$PORT"}/api/v1`;
const connected = `until ${api}/agents/u-1 | grep -q '"server_id"'; do sleep 0.1; done`;

/** Prints the rows of the guide's query as soon as the three calls are there: the audit log is written in batches. */
const rows = `
import sqlite3, time
end = time.monotonic() + 20
while True:
    rows = sqlite3.connect("wsproxy.db").execute(${JSON.stringify(/"(SELECT .*)"/.exec(guide)[1])}).fetchall()
    if sum('"hello.txt"' in str(row) for row in rows) >= 3 or time.monotonic() > end:
        break
    time.sleep(0.1)
for row in rows:
    print(*row)`;

for (const agent of ["python agent.py", "node agent.mjs"]) {
  test(`each caller gets the answer of ${agent}`, async () => {
    rmSync(join(folder, "wsproxy.db"), { force: true });
    const { stdout } = await shell([
      ...gateway(), block("sh", "wsproxy agents add"), `${agent} &`, connected, hello,
      "echo '== python'", "python call.py", "echo '== node'", "node call.mjs", "echo '== curl'", block("sh", '"tool":"read_file"'),
      "echo; echo '== audit'", `python - <<'END'\n${rows}\nEND`,
    ]);
    const said = Object.fromEntries(stdout.split("== ").slice(1).map((part) => [part.slice(0, part.indexOf("\n")), part.slice(part.indexOf("\n") + 1)]));
    for (const caller of ["python", "node"]) {
      assert.match(said[caller], /reading hello\.txt/, "progress");
      assert.match(said[caller], /^Hello from this machine\.$/m);
      assert.match(said[caller], /^The tool failed: .*No such file|^The tool failed: ENOENT/m);
    }
    const { success, result, outcome } = JSON.parse(said.curl);
    assert.deepEqual([success, result, outcome], [true, "Hello from this machine.\n", "response"]);
    assert.equal(said.audit.trim().split("\n").filter((row) => /^read_file \{"path":"hello\.txt"\} response \d+$/.test(row)).length, 3, said.audit);
  });
}

test("a secret over HTTP opens an agent, and the commands about secrets do what the guide says", async () => {
  rmSync(join(folder, "wsproxy.db"), { force: true });
  const { stdout } = await shell([
    ...gateway(), `AGENT_SECRET=$(${block("sh", "agents/u-1/secrets").trim()} | python -c 'import json, sys; print(json.load(sys.stdin)["secret"])')`,
    "export AGENT_SECRET", "node agent.mjs 2>ended & AGENT=$!", connected,
    // The status is written in batches.
    "until wsproxy agents list --connected | grep u-1; do sleep 0.1; done", "wsproxy agents rotate u-1 --overlap 24h", "wsproxy agents revoke u-1",
    `${api}/agents/u-1 -X DELETE >/dev/null`, "wait $AGENT || true", "cat ended",
  ]);
  assert.match(stdout, /^u-1 +connected/m);
  assert.match(stdout, /^wsa_[\w-]{43}$/m);
  assert.match(stdout, /^Revoked: 2 secrets of u-1\./m);
  assert.match(stdout, /AgentRefused: The gateway does not accept the secret of u-1/);
});
