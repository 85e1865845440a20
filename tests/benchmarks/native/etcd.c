/* etcd: gRPC, which is protobuf messages in HTTP/2 frames, each call a stream of its own.
 *
 * The headers are written out in full each time, with nothing for the server to remember. Of its own headers only the
 * end of the stream counts: a call that was refused has no message. Both windows are opened so wide that only the
 * connection's is ever given more.
 */
#include "load.h"

#include <string.h>

enum { DATA = 0, HEADERS = 1, RESET = 3, SETTINGS = 4, PING = 6, GOAWAY = 7, WINDOW_UPDATE = 8 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4 };
#define FRAME_HEAD 9
#define MESSAGE_HEAD 5 /* gRPC: whether it is compressed, and the length */
#define WINDOW 0x70000000u

static void frame(struct card *card, size_t length, int kind, int flags) {
    card_number(card, (uint32_t)length, 3);
    card_number(card, (uint32_t)kind, 1);
    card_number(card, (uint32_t)flags, 1);
}

static void header_text(struct card *card, const char *text) {
    card_number(card, (uint32_t)strlen(text), 1);
    card_text(card, text);
}

static void headers(struct card *card, const char *path) {
    struct card block = {0};
    card_bytes(&block, "\x83\x86\x04", 3); /* :method POST, :scheme http, :path */
    header_text(&block, path);
    card_bytes(&block, "\x01", 1); /* :authority */
    header_text(&block, "localhost");
    card_bytes(&block, "\x0f\x10", 2); /* content-type */
    header_text(&block, "application/grpc");
    card_bytes(&block, "\0", 1);
    header_text(&block, "te");
    header_text(&block, "trailers");
    frame(card, block.length, HEADERS, END_HEADERS);
    card_add(card, "%S", 2);
    card_bytes(card, block.bytes, block.length);
}

/* A message, which has holes itself: so it is given as text, whose length as filled is told beside it. */
static void message(struct card *card, const struct card *text, size_t filled, int flags) {
    frame(card, filled + MESSAGE_HEAD, DATA, flags);
    card_add(card, "%S", 2);
    card_number(card, 0, 1);
    card_number(card, (uint32_t)filled, 4);
    card_add(card, text->bytes, text->length);
}

static void field(struct card *text, int number, const char *value, size_t filled) {
    card_number(text, (uint32_t)number << 3 | 2, 1);
    card_number(text, (uint32_t)filled, 1); /* all are shorter than 128 */
    card_bytes(text, value, strlen(value));
}

static uint64_t varint(const char **at, const char *end) {
    uint64_t number = 0;
    for (int shift = 0; *at < end && shift < 64; shift += 7) {
        char byte = *(*at)++;
        number |= (uint64_t)(byte & 127) << shift;
        if ((byte & 128) == 0)
            return number;
    }
    die("etcd's message is cut off");
}

/* Find a field that has bytes; NULL where there is none. */
static const char *bytes_field(const char *at, const char *end, uint64_t wanted, size_t *length) {
    while (at < end) {
        uint64_t tag = varint(&at, end), number = varint(&at, end);
        if ((tag & 7) == 0)
            continue;
        if ((tag & 7) != 2 || number > (uint64_t)(end - at))
            die("etcd's message is not as it should be");
        *length = number;
        if (tag >> 3 == wanted)
            return at;
        at += number;
    }
    return NULL;
}

/* A call has ended: the value of the pair that came, or the whole message where it is not about one. */
static void conclude(struct slot *slot, uint32_t number, struct answer *answer) {
    if (slot->held_length < MESSAGE_HEAD)
        die("etcd refused a call about svc-%06u", slot->asked.key);
    const char *begin = slot->held + MESSAGE_HEAD, *end = slot->held + slot->held_length;
    *answer = (struct answer){ANSWER, number, begin, (size_t)(end - begin)};
    if (slot->work != READ)
        return;
    size_t length;
    const char *pair = bytes_field(begin, end, 2, &length);
    if (pair == NULL)
        die("etcd has no svc-%06u", slot->asked.key);
    const char *value = bytes_field(pair, pair + length, 5, &length);
    if (value == NULL)
        die("etcd has nothing in svc-%06u", slot->asked.key);
    answer->payload = value;
    answer->length = length;
}

static void give_window(struct connection *connection, size_t length) {
    char update[FRAME_HEAD + 4] = {0, 0, 4, WINDOW_UPDATE, 0, 0, 0, 0, 0, 0x40, 0, 0, 0};
    connection->taken_bytes += length;
    if (connection->taken_bytes < 0x40000000u)
        return;
    say(connection, update, sizeof update);
    connection->taken_bytes -= 0x40000000u;
}

static void acknowledge(struct connection *connection, const char *bytes, size_t length) {
    char back[FRAME_HEAD + 8] = {0};
    memcpy(back, bytes, length);
    back[4] = ACK;
    say(connection, back, length);
}

static void settings(struct connection *connection) {
    static const char none[FRAME_HEAD] = {0, 0, 0, SETTINGS, 0, 0, 0, 0, 0};
    acknowledge(connection, none, sizeof none);
}

static size_t take(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    if (length < FRAME_HEAD)
        return 0;
    size_t size = number_at(bytes) >> 8, whole = FRAME_HEAD + size;
    if (length < whole)
        return 0;
    int kind = bytes[3], flags = bytes[4];
    uint32_t number = (number_at(bytes + 5) >> 1) % SLOTS;
    struct slot *slot = &connection->slots[number];
    switch (kind) {
    case DATA:
        if (slot->held_length + size > HELD_BYTES)
            die("etcd's message is too long");
        memcpy(slot->held + slot->held_length, bytes + FRAME_HEAD, size);
        slot->held_length += size;
        give_window(connection, size);
        break;
    case HEADERS:
        if (flags & END_STREAM)
            conclude(slot, number, answer);
        break;
    case SETTINGS:
        if (flags & ACK)
            break;
        settings(connection);
        answer->kind = GREETED;
        break;
    case PING:
        if (!(flags & ACK) && size == 8)
            acknowledge(connection, bytes, whole);
        break;
    case RESET:
    case GOAWAY: die("etcd ended a call or the connection");
    }
    return whole;
}

void make_etcd(struct protocol *etcd) {
    struct card range = {0}, put = {0}, wanted = {0}, watch = {0};
    size_t value = value_card().length, key = 10;
    etcd->take = take;
    card_bytes(&etcd->greeting, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
    frame(&etcd->greeting, 6, SETTINGS, 0);
    card_number(&etcd->greeting, 0, 4);
    card_number(&etcd->greeting, 4, 2); /* the window of a new stream */
    card_number(&etcd->greeting, WINDOW, 4);
    frame(&etcd->greeting, 4, WINDOW_UPDATE, 0);
    card_number(&etcd->greeting, 0, 4);
    card_number(&etcd->greeting, WINDOW, 4);

    field(&range, 1, "svc-%N", key);
    headers(&etcd->request[READ], "/etcdserverpb.KV/Range");
    message(&etcd->request[READ], &range, key + 2, END_STREAM);
    card_text(&etcd->reply[READ], VALUE);

    field(&put, 1, "svc-%N", key);
    field(&put, 2, VALUE, value);
    headers(&etcd->request[WRITE], "/etcdserverpb.KV/Put");
    message(&etcd->request[WRITE], &put, key + value + 4, END_STREAM);
    etcd->reply[WRITE].open_end = 1;

    field(&wanted, 1, "svc-%N", key);
    card_number(&watch, 1 << 3 | 2, 1); /* create_request */
    card_number(&watch, (uint32_t)key + 2, 1);
    card_bytes(&watch, wanted.bytes, wanted.length);
    headers(&etcd->watch, "/etcdserverpb.Watch/Watch");
    message(&etcd->watch, &watch, key + 4, 0);
    etcd->publish = etcd->request[WRITE];
}
