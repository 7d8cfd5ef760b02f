import assert from "node:assert/strict";
import { join } from "node:path";
import type { AuthKind } from "../../../lib/auth_key.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { authenticationObstacle } from "../../../lib/host/nvme/authentication.ts";
import { createLogger } from "../../../lib/log.ts";

Deno.test("authenticationObstacle names what the kernel lacks, from the list of its options", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-authentication-" });
  try {
    const host = createLinuxHost({ log: createLogger("error"), devRoot: directory, procRoot: directory });
    const obstacle = (kind: AuthKind) => authenticationObstacle(host, kind);

    assert.match(
      await obstacle("unidirectional") ?? "",
      /nvme-fabrics is missing, the kernel module nvme_tcp is needed/,
    );
    const fabrics = join(directory, "nvme-fabrics");
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s,dhchap_secret=%s,duplicate_connect\n");
    assert.equal(await obstacle("unidirectional"), undefined);
    assert.match(await obstacle("bidirectional") ?? "", /\(no dhchap_ctrl_secret among the options of/);
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s,dhchap_secret=%s,dhchap_ctrl_secret=%s\n");
    assert.equal(await obstacle("bidirectional"), undefined);
    const symbols = join(directory, "kallsyms");
    await Deno.writeTextFile(symbols, "0 T nvmf_connect_admin_queue\t[nvme_fabrics]\n0 T nvme_auth_negotiated\t[x]\n");
    assert.match(await obstacle("bidirectional") ?? "", /was built without the authentication of NVMe connections/);
    await Deno.writeTextFile(
      symbols,
      "0 T nvmf_connect_admin_queue\t[nvme_fabrics]\n0 T nvme_auth_negotiate\t[nvme_core]\n",
    );
    assert.equal(await obstacle("bidirectional"), undefined);
    await Deno.writeTextFile(symbols, "");
    assert.equal(await obstacle("bidirectional"), undefined);
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s\n");
    assert.match(await obstacle("bidirectional") ?? "", /\(no dhchap_secret, dhchap_ctrl_secret among the options of/);
    await Deno.remove(fabrics);
    await Deno.mkdir(fabrics);
    assert.match(await obstacle("unidirectional") ?? "", /does not tell which options of connections it knows/);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});
