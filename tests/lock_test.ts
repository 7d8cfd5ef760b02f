import assert from "node:assert/strict";
import { KeyedLock } from "../lib/lock.ts";

const never = new AbortController().signal;
/** Lets everything that is ready to go on do so. */
const settle = () => new Promise((resolve) => setImmediate(resolve));

Deno.test("promise 9: KeyedLock.take refuses the second call for a volume, naming the first and for how long it runs", () => {
  const locks = new KeyedLock();
  using _held = locks.take("volume v1", "NodeStageVolume");

  assert.throws(() => locks.take("volume v1", "NodeUnstageVolume"), {
    name: "StatusError",
    code: "ABORTED",
    message:
      "Cannot start NodeUnstageVolume for volume v1: NodeStageVolume has been running for 0 s, repeat the call later",
  });
});

Deno.test("promise 9: KeyedLock.take leaves calls for other volumes alone", () => {
  const locks = new KeyedLock();
  using _one = locks.take("volume v1", "NodeStageVolume");

  using _two = locks.take("volume v2", "NodeStageVolume");

  assert.throws(() => locks.take("volume v2", "NodeStageVolume"), { code: "ABORTED" });
});

Deno.test("promise 9: of racing KeyedLock.take calls exactly one wins", async () => {
  const locks = new KeyedLock();
  let inside = 0;
  let won = 0;
  const call = async () => {
    await settle();
    using _held = locks.take("volume v1", "ControllerPublishVolume");
    won++;
    assert.equal(++inside, 1);
    await settle();
    inside--;
  };

  const results = await Promise.allSettled(Array.from({ length: 10 }, call));

  assert.equal(won, 1);
  assert.equal(results.filter(({ status }) => status === "fulfilled").length, 1);
});

Deno.test("KeyedLock.take gets a key that was released, and a second release of the first holder changes nothing", () => {
  const locks = new KeyedLock();
  const first = locks.take("k", "first");
  first[Symbol.dispose]();
  using _second = locks.take("k", "second");

  first[Symbol.dispose]();

  assert.throws(() => locks.take("k", "third"), { code: "ABORTED", message: /: second has been running for / });
});

Deno.test("KeyedLock.wait serves its callers first come, first served, one at a time", async () => {
  const locks = new KeyedLock();
  const order: number[] = [];
  let inside = 0;
  const first = locks.take("subsystem s", "first");
  const waiting = [1, 2, 3, 4, 5].map(async (n) => {
    using _held = await locks.wait("subsystem s", `holder ${n}`, never);
    assert.equal(++inside, 1);
    order.push(n);
    await settle();
    inside--;
  });
  await settle();
  assert.deepEqual(order, []);

  first[Symbol.dispose]();
  await Promise.all(waiting);

  assert.deepEqual(order, [1, 2, 3, 4, 5]);
  using _free = locks.take("subsystem s", "afterwards");
});

Deno.test("KeyedLock lets no caller slip in between a release and the wake-up of the next in line", async () => {
  const locks = new KeyedLock();
  const first = locks.take("k", "first");
  const second = locks.wait("k", "second", never);

  first[Symbol.dispose]();
  assert.throws(() => locks.take("k", "thief"), { code: "ABORTED" });
  const third = locks.wait("k", "third", never);

  const held = await second;
  assert.throws(() => locks.take("k", "thief"), { message: /: second has been running for / });
  held[Symbol.dispose]();
  (await third)[Symbol.dispose]();
});

Deno.test("KeyedLock wakes one caller when a holder is released twice", async () => {
  const locks = new KeyedLock();
  const first = locks.take("k", "first");
  let inside = 0;
  const waiting = [1, 2].map(async (n) => {
    using _held = await locks.wait("k", `holder ${n}`, never);
    assert.equal(++inside, 1);
    await settle();
    inside--;
  });
  await settle();

  first[Symbol.dispose]();
  first[Symbol.dispose]();

  await Promise.all(waiting);
});

Deno.test("KeyedLock.wait rejects with the signal's reason, and those behind it still get their turn", async () => {
  const locks = new KeyedLock();
  const first = locks.take("k", "first");
  const tired = new AbortController();
  const second = locks.wait("k", "second", tired.signal);
  const third = locks.wait("k", "third", never);
  const reason = new Error("too slow");

  tired.abort(reason);
  await assert.rejects(second, reason);
  first[Symbol.dispose]();

  (await third)[Symbol.dispose]();
  using _free = locks.take("k", "afterwards");
});

Deno.test("KeyedLock.wait rejects at once when the signal has aborted before", async () => {
  const locks = new KeyedLock();
  const reason = new Error("too late");

  await assert.rejects(locks.wait("k", "late", AbortSignal.abort(reason)), reason);

  using _free = locks.take("k", "afterwards");
});

Deno.test("KeyedLock.wait gives up in the line of a later holder", async () => {
  const locks = new KeyedLock();
  const first = locks.take("k", "first");
  const second = locks.wait("k", "second", never);
  const tired = new AbortController();
  const third = locks.wait("k", "third", tired.signal);
  const fourth = locks.wait("k", "fourth", never);
  first[Symbol.dispose]();
  const held = await second;

  tired.abort(new Error("too slow"));
  await assert.rejects(third, { message: "too slow" });
  held[Symbol.dispose]();

  (await fourth)[Symbol.dispose]();
  using _free = locks.take("k", "afterwards");
});

Deno.test("KeyedLock loses no wake-up when a caller gives up in the same turn in which its predecessor releases the key", async () => {
  for (const abortFirst of [true, false]) {
    const locks = new KeyedLock();
    const first = locks.take("k", "first");
    const tired = new AbortController();
    const second = locks.wait("k", "second", tired.signal).then((held) => held[Symbol.dispose](), () => {});
    const third = locks.wait("k", "third", never);

    if (abortFirst) tired.abort(new Error("too slow"));
    first[Symbol.dispose]();
    if (!abortFirst) tired.abort(new Error("too slow"));

    await second;
    (await third)[Symbol.dispose]();
    using _free = locks.take("k", "afterwards");
  }
});

Deno.test("KeyedLock keeps its promises through 300 random takes, waits, releases and aborts", async () => {
  const locks = new KeyedLock();
  const inside = new Map<string, number>();
  let served = 0;
  const work = async (n: number) => {
    const key = `k${n % 3}`;
    const signal = n % 7 === 0 ? AbortSignal.timeout(n % 5) : never;
    for (let i = 0; i < n % 4; i++) await settle();
    using _held = n % 5 === 0 ? locks.take(key, `take ${n}`) : await locks.wait(key, `wait ${n}`, signal);
    assert.equal(inside.get(key) ?? 0, 0);
    inside.set(key, 1);
    if (n % 2 === 0) await settle();
    inside.set(key, 0);
    served++;
  };

  const results = await Promise.allSettled(Array.from({ length: 300 }, (_, n) => work(n)));

  const failures = results.flatMap((result) => result.status === "rejected" ? [result.reason] : []);
  for (const error of failures) assert.ok(error.code === "ABORTED" || error.name === "TimeoutError", String(error));
  assert.equal(served + failures.length, 300);
  for (const key of ["k0", "k1", "k2"]) locks.take(key, "afterwards")[Symbol.dispose]();
});

Deno.test("KeyedLock.takeWithin waits for a call that ends in time, in turn with others", async () => {
  const locks = new KeyedLock();
  const order: string[] = [];
  const first = locks.take("volume v1", "ControllerPublishVolume");
  const calls = ["b", "c"].map(async (name) => {
    using _held = await locks.takeWithin(60_000, "volume v1", "ControllerPublishVolume", never);
    order.push(name);
    await settle();
  });

  await settle();
  assert.deepEqual(order, []);
  first[Symbol.dispose]();
  await Promise.all(calls);

  assert.deepEqual(order, ["b", "c"]);
});

Deno.test("promise 9: KeyedLock.takeWithin tells after its time which call runs", async () => {
  const locks = new KeyedLock();
  using _held = locks.take("volume v1", "ControllerExpandVolume");

  await assert.rejects(locks.takeWithin(1, "volume v1", "ControllerPublishVolume", never), {
    code: "ABORTED",
    message: /^Cannot start ControllerPublishVolume for volume v1: ControllerExpandVolume has been running for \d+ s/,
  });
});

Deno.test("KeyedLock.takeWithin rejects with the caller's reason when the caller is gone first", async () => {
  const locks = new KeyedLock();
  using _held = locks.take("volume v1", "ControllerExpandVolume");
  const gone = new Error("gone");
  const caller = new AbortController();
  const call = locks.takeWithin(60_000, "volume v1", "ControllerPublishVolume", caller.signal);
  caller.abort(gone);

  await assert.rejects(call, (error) => error === gone);
});
