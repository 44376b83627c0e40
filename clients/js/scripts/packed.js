// Checks the archive that npm would publish: its files, and that a program which installs it gets the code and its types.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "wsproxy-packed-"));
const run = (command, ...args) => execFileSync(command, args, { cwd: folder, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });

try {
  // The caller has built `dist` already.
  const [archive] = JSON.parse(run("npm", "pack", root, "--json", "--ignore-scripts"));
  const files = new Set(archive.files.map(({ path }) => path));
  for (const file of ["README.md", "LICENSE-MIT", "LICENSE-APACHE", "package.json", "dist/index.js", "dist/index.d.ts", "dist/agents/index.js", "dist/agents/index.d.ts", "dist/rooms/index.js", "dist/rooms/index.d.ts", "dist/rooms/binary.js"]) {
    assert(files.has(file), `${file} is not in the archive`);
  }
  for (const file of files) assert(!/^(test|scripts|node_modules)\//.test(file), `${file} is in the archive`);
  for (const license of ["LICENSE-MIT", "LICENSE-APACHE"]) {
    assert.equal(readFileSync(join(root, license), "utf8"), readFileSync(join(root, "../..", license), "utf8"), `${license} differs from the repository's`);
  }

  writeFileSync(join(folder, "package.json"), '{ "type": "module", "private": true }');
  run("npm", "install", `./${archive.filename}`, "--silent", "--offline", "--no-audit", "--no-fund");
  const imports = 'import { connectSession } from "@wsproxy/client";\nimport { Agent } from "@wsproxy/client/agents";\nimport { connectRoom } from "@wsproxy/client/rooms";\n';
  writeFileSync(join(folder, "use.ts"), `${imports}export const opens: Function[] = [connectSession, Agent, connectRoom];\n`);
  run(process.execPath, join(root, "node_modules/typescript/bin/tsc"), "--noEmit", "--strict", "--module", "nodenext", "--types", "", "use.ts");
  run(process.execPath, "--input-type=module", "-e", `${imports}connectSession.call; Agent.call; connectRoom.call;`);
  console.log(`${archive.filename}: ${files.size} files, installs and imports`);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
