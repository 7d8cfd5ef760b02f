/**
 * Requests to DAgent over HTTP, and its answers as data or errors (facts: docs/reference/poseidonos-api.md section 5).
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { Fields } from "../../log.ts";
import { countManagementCall, type Metrics } from "../../metrics.ts";
import { formatSeconds } from "../../timing.ts";
import { abortCode, inTime } from "../polling.ts";
import { type Meaning, meaningOf } from "./codes.ts";
import { PoseidonError } from "./dagent_error.ts";

/** A request to DAgent. */
export interface DagentRequest {
  readonly method: "GET" | "POST" | "DELETE";
  /** Behind `/api/ibofos/v1`, its variable parts encoded. */
  readonly path: string;
  readonly param?: Readonly<Record<string, unknown>>;
}

/** Where and how a request is sent. */
export interface DagentCall {
  /** `host:port`. */
  readonly address: string;
  readonly metrics: Metrics | undefined;
  /** Aborts the request: with the caller for a read, later for a change. */
  readonly signal: AbortSignal;
}

const basePath = "/api/ibofos/v1";
/** The longest answer that is read: 256 volumes have some 100 KiB. */
const longestAnswerBytes = 8 << 20;

const envelopeSchema = z.object({
  result: z.object({
    status: z.object({
      code: z.number(),
      eventName: z.string().default(""),
      cause: z.string().default(""),
      description: z.string().default(""),
      posDescription: z.string().default(""),
      errorInfo: z.object({ errorCode: z.number().default(0) }).optional(),
    }),
    data: z.unknown().optional(),
  }),
  info: z.object({ version: z.string().default("") }).optional(),
});

/**
 * Sends one request, once.
 *
 * @param onVersion called with what PoseidonOS calls itself, also when the answer is an error
 * @throws PoseidonError with what DAgent says, UNAVAILABLE when it cannot be reached or something else answers
 */
export async function callDagent(
  ctx: RequestContext,
  call: DagentCall,
  request: DagentRequest,
  onVersion: (version: string) => void,
): Promise<unknown> {
  const { address, metrics } = call;
  const what = `${request.method} ${request.path}`;
  const requestId = crypto.randomUUID();
  const started = performance.now();
  const note = (fields: Fields & { readonly code: string }) => {
    const ms = Math.round(performance.now() - started);
    const method = `${request.method} ${routeOf(request.path)}`;
    countManagementCall(metrics, { endpoint: address, method, code: fields.code, ms });
    ctx.log.debug("called the management API", { rpc: what, address, requestId, ms, ...fields });
  };
  let answer;
  try {
    answer = await send(call, request, requestId);
  } catch (error) {
    const reason = connectionProblem(error);
    note({ code: "UNAVAILABLE", error: reason });
    if (ctx.signal.aborted && call.signal === ctx.signal) {
      throw new PoseidonError(
        inTime(ctx),
        "no answer from PoseidonOS",
        `PoseidonOS at ${address} has not answered ${what} after ${
          formatSeconds(performance.now() - started)
        }; repeat the call`,
        { cause: ctx.signal.reason, code: abortCode(ctx.signal) },
      );
    }
    throw new PoseidonError(
      ctx,
      "no answer from PoseidonOS",
      `the DAgent at ${address} cannot be reached, or broke off ${what} (${reason})`,
      { cause: error },
    );
  }
  const result = readAnswer(answer, onVersion);
  if ("data" in result) {
    note({ code: "0" });
    return result.data;
  }
  const { meaning, words } = result;
  note({ code: String(answer.status), error: words });
  throw new PoseidonError(ctx, meaning, `PoseidonOS at ${address} answered ${what} with ${words}`);
}

async function send(
  { address, signal }: DagentCall,
  { method, path, param }: DagentRequest,
  requestId: string,
): Promise<{ readonly status: number; readonly text: string }> {
  const response = await fetch(`http://${address}${basePath}${path}`, {
    method,
    headers: {
      "X-request-Id": requestId,
      ts: String(Math.floor(Date.now() / 1000)),
      ...(method === "GET" ? {} : { "Content-Type": "application/json" }),
    },
    ...(method === "GET" ? {} : { body: sendOnce(JSON.stringify({ param: param ?? {} })) }),
    redirect: "manual",
    signal,
  });
  return { status: response.status, text: await readText(response, longestAnswerBytes) };
}

/** The data of an answer, or what its failure means and DAgent's words for it. */
function readAnswer(
  { status, text }: { readonly status: number; readonly text: string },
  onVersion: (version: string) => void,
): { readonly data: unknown } | { readonly meaning: Meaning; readonly words: string } {
  const envelope = envelopeSchema.safeParse(parseJson(text));
  if (!envelope.success) {
    // A proxy in between, a DAgent that panicked (500), an answer that was cut off, or something that is not a DAgent
    // at all (404). In each case it does not say what PoseidonOS has done.
    const words = `HTTP status ${status} and no envelope of DAgent`;
    const isServerError = status >= 500;
    return {
      meaning: "no answer from PoseidonOS",
      words: isServerError
        ? words
        : `${words}: a proxy in between, or there is no DAgent of a known version at this address`,
    };
  }
  const { result, info } = envelope.data;
  if (info !== undefined && info.version !== "") onVersion(info.version);
  const { code, eventName, errorInfo } = result.status;
  if (status === 200 && code === 0 && (errorInfo?.errorCode ?? 0) === 0) return { data: result.data };
  if (code === 0) return { meaning: "unknown", words: `HTTP status ${status}: it did not take the request as it is` };
  const description = [result.status.cause, result.status.description, result.status.posDescription]
    .find((words) => words !== "") ?? "";
  const words = `${code}${eventName === "" ? "" : ` ${eventName}`}${description === "" ? "" : `: ${description}`}`;
  return { meaning: meaningOf(code, eventName), words };
}

/**
 * Parts of routes that are words of DAgent (docs/reference/poseidonos-api.md 6), and not names of arrays and volumes.
 */
const routeWords: ReadonlySet<string> = new Set(
  ["array", "listener", "mount", "qos", "subsystem", "transports", "volumelist", "volumes"],
);

/** A path without names, as a kind of call: `/volumes/{}/mount`. */
function routeOf(path: string): string {
  return path.split("/").map((part, at) => at === 0 || routeWords.has(part) ? part : "{}").join("/");
}

/** The reason for a failed connection, without the address that the message around it has already. */
function connectionProblem(error: unknown): string {
  const cause = error instanceof Error && error.cause !== undefined ? error.cause : error;
  const text = messageOf(cause);
  return /client error \(\w+\): (.*)$/.exec(text)?.[1] ?? text;
}

/**
 * A body that can be sent only once. With any other, fetch (Deno 2.9.5) sends the request again by itself when the
 * connection ends without an answer, whatever the method.
 */
function sendOnce(text: string): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode(text));
      controller.close();
    },
  });
}

/** The body of an answer; throws when it is longer than `mostBytes`. */
async function readText(response: Response, mostBytes: number): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  let bytes = 0;
  for await (const part of response.body ?? []) {
    bytes += part.length;
    // Leaving the loop ends the connection.
    if (bytes > mostBytes) throw new Error(`its answer has more than ${mostBytes >> 20} MiB`);
    text += decoder.decode(part, { stream: true });
  }
  return text + decoder.decode();
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
