// A socket.io server with its Redis adapter. `node socketio.mjs PORT REDIS_SOCKET` holds the sockets, and joins each to
// the room its address names; `node socketio.mjs ingest REDIS_SOCKET` tells the rooms what is published, through the
// adapter. Both say "ready".

import { createServer } from "node:http";
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/`);
const { Server } = require("socket.io");
const { createAdapter } = require("@socket.io/redis-adapter");
const { createClient } = require("redis");

const [port, path] = process.argv.slice(2);
const connect = async () => {
  const client = createClient({ socket: { path }, disableClientInfo: true });
  await client.connect();
  return client;
};

const http = createServer();
const io = new Server(http, { transports: ["websocket"], perMessageDeflate: false });
io.adapter(createAdapter(await connect(), await connect()));
if (port === "ingest") {
  await (await connect()).subscribe("fanout", (message) => {
    const space = message.indexOf(" ");
    io.to(message.slice(0, space)).emit("message", JSON.parse(message.slice(space + 1)));
  });
  console.log("ready");
} else {
  io.on("connection", (socket) => socket.join(socket.handshake.query.room));
  http.listen(Number(port), "127.0.0.1", () => console.log("ready"));
}
