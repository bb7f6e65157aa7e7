// A client of teacher.proto in Node, written from docs/protocol.md, proto/ and docs/targets-format.md alone.
//
//   node client.mjs JSON      with address, protos (the folder proto/), spec, sequences, and as needed token, ca, clientId
//
// Prints one JSON object: what the server says of itself, and for each sequence its decoded targets or its error.
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const options = JSON.parse(process.argv[2]);

const definition = protoLoader.loadSync("logitstream/rpc/v1/teacher.proto", {
  includeDirs: [options.protos],
  keepCase: true,
  longs: String,
  defaults: true,
  oneofs: true,
});
const { TeacherService } = grpc.loadPackageDefinition(definition).logitstream.rpc.v1;

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// Rows of [id, weight] of a payload of codec version 1.
function decode(payload, numTokens) {
  const end = payload.length - 4;
  if (end < 24 || crc32(payload.subarray(0, end)) !== payload.readUInt32LE(end)) throw new Error("checksum differs");
  if (payload.readUInt32LE(0) !== 1) throw new Error("not version 1");
  const [, units, tailUnits, numRows, numEntries] = [4, 8, 12, 16, 20].map((at) => payload.readUInt32LE(at));
  if (numRows !== numTokens || payload.length !== 28 + 4 * numRows + 8 * numEntries) throw new Error("wrong length");
  const ids = 24 + 4 * numRows;
  const counts = ids + 4 * numEntries;
  const rows = [];
  for (let row = 0, entry = 0; row < numRows; row++) {
    const last = entry + payload.readUInt32LE(24 + 4 * row);
    const found = [];
    for (; entry < last; entry++) found.push([payload.readUInt32LE(ids + 4 * entry), payload.readUInt32LE(counts + 4 * entry)]);
    const tail = Math.max(units - found.reduce((sum, [, count]) => sum + count, 0), tailUnits);
    const numTail = found.filter(([, count]) => count === 0).length;
    rows.push(found.map(([id, count]) => [id, count ? count / units : tail / numTail / units]));
  }
  return rows;
}

function tokenBytes(ids) {
  const bytes = Buffer.alloc(4 * ids.length);
  ids.forEach((id, i) => bytes.writeUInt32LE(id, 4 * i));
  return bytes;
}

const credentials = options.ca ? grpc.credentials.createSsl(readFileSync(options.ca)) : grpc.credentials.createInsecure();
const client = new TeacherService(options.address, credentials, { "grpc.max_receive_message_length": 8 << 20 });
const metadata = new grpc.Metadata();
if (options.token) metadata.set("authorization", `Bearer ${options.token}`);

function describe() {
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + 10_000;
    client.Describe({}, metadata, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// The outcome of each sequence, in one call.
function ask(vocabSize) {
  return new Promise((resolve, reject) => {
    const outcomes = [];
    const call = client.Score(
      {
        client_id: options.clientId ?? "node",
        vocab_size: vocabSize,
        spec: options.spec,
        sequences: options.sequences.map((ids) => ({ token_bytes: tokenBytes(ids) })),
      },
      metadata,
      { deadline: Date.now() + 30_000 },
    );
    call.on("data", ({ results }) => {
      for (const result of results) {
        const numTokens = options.sequences[result.index].length;
        outcomes[result.index] =
          result.outcome === "targets" ? { rows: decode(result.targets, numTokens) } : { error: result.error };
      }
    });
    call.on("error", reject);
    call.on("end", () => resolve(outcomes));
  });
}

try {
  const described = await describe();
  const outcomes = await ask(described.vocab_size);
  console.log(JSON.stringify({ model: described.model, vocabSize: described.vocab_size, outcomes }));
} catch (error) {
  console.log(JSON.stringify({ status: error.code ?? -1, details: error.details ?? String(error) }));
}
client.close();
