// Makes src/rooms/v1/rooms_pb.ts from spec/rooms/v1/rooms.proto. `npm run generate` fetches the tools; nothing else needs them.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const spec = fileURLToPath(new URL("../../../spec/rooms", import.meta.url));
const target = fileURLToPath(new URL("../src/rooms/v1/rooms_pb.ts", import.meta.url));
const tools = ["@bufbuild/buf@1.75.0", "@bufbuild/protoc-gen-es@2.17.0"];
const folder = mkdtempSync(join(tmpdir(), "wsproxy-generate-"));
try {
  const template = { version: "v2", plugins: [{ local: "protoc-gen-es", out: folder, opt: ["target=ts"] }] };
  const packages = tools.flatMap((tool) => ["--package", tool]);
  execFileSync("npx", ["--yes", ...packages, "buf", "generate", spec, "--template", JSON.stringify(template)], { cwd: folder, stdio: "inherit" });
  const hash = createHash("sha256").update(readFileSync(join(spec, "v1/rooms.proto"))).digest("hex");
  writeFileSync(target, `// Made by npm run generate from the rooms.proto with the SHA-256 ${hash}.\n\n${readFileSync(join(folder, "v1/rooms_pb.ts"), "utf8")}`);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
