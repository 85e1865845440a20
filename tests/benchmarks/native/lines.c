/* Protocols of lines: regd, the floor, Redis, memcached. Their replies come in the order of the requests. */
#include "load.h"

#include <stdlib.h>
#include <string.h>

static size_t in_order(struct connection *connection, struct answer *answer, const char *payload, size_t length) {
    *answer = (struct answer){ANSWER, connection->answered++ % SLOTS, payload, length};
    return length;
}

static size_t take_line(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    size_t line = line_length(bytes, length);
    return line == 0 ? 0 : in_order(connection, answer, bytes, line);
}

void make_regd(struct protocol *regd) {
    regd->take = take_line;
    card_text(&regd->request[READ], "{\"cmd\":\"resolve\",\"name\":\"svc-%N\"}\n");
    card_text(&regd->reply[READ], "{\"ok\":true," INSTANCE ",\"rev\":");
    card_text(&regd->request[WRITE],
        "{\"cmd\":\"register\",\"name\":\"svc-%N\",\"port\":%P,\"meta\":{\"n\":\"%C\"}}\n");
    card_text(&regd->reply[WRITE],
        "{\"ok\":true,\"name\":\"svc-%N\",\"instance\":\"\",\"host\":\"127.0.0.1\",\"port\":%P,\"rev\":");
    regd->reply[READ].open_end = regd->reply[WRITE].open_end = 1; /* the revision, and when it was registered */
    card_text(&regd->request[PING_WORK], "{\"cmd\":\"ping\"}\n");
    card_text(&regd->reply[PING_WORK], "{\"ok\":true}\n");
    card_text(&regd->watch, "{\"cmd\":\"watch\",\"name\":\"svc-%N\"}\n");
    regd->publish = regd->request[WRITE];
}

/* regd's requests, and for all of them the reply about the first name. */
void make_floor(struct protocol *floor) {
    static const struct asked first;
    struct protocol regd = {0};
    char answer[CARD_BYTES];
    make_regd(&regd);
    floor->take = take_line;
    floor->request[READ] = regd.request[READ];
    card_bytes(&floor->reply[READ], answer, card_fill(&regd.reply[READ], &first, answer));
    card_text(&floor->reply[READ], "1,\"registered_at\":1790000000.123}\n");
}

static size_t take_resp(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    size_t line = line_length(bytes, length);
    if (line == 0)
        return 0;
    if (bytes[0] != '$' || bytes[1] == '-')
        return in_order(connection, answer, bytes, line);
    size_t bulk = strtoul(bytes + 1, NULL, 10), whole = line + bulk + 2;
    if (length < whole)
        return 0;
    in_order(connection, answer, bytes + line, bulk);
    return whole;
}

void make_redis(struct protocol *redis) {
    struct card value = value_card();
    redis->take = take_resp;
    card_text(&redis->request[READ], "*2\r\n$3\r\nGET\r\n$10\r\nsvc-%N\r\n");
    redis->reply[READ] = value;
    card_text(&redis->request[WRITE], "*3\r\n$3\r\nSET\r\n$10\r\nsvc-%N\r\n");
    card_print(&redis->request[WRITE], "$%zu\r\n", value.length);
    card_text(&redis->request[WRITE], VALUE "\r\n");
    card_text(&redis->reply[WRITE], "+OK\r\n");
    card_text(&redis->watch, "*2\r\n$9\r\nSUBSCRIBE\r\n$7\r\nchanges\r\n");
    /* Kept and told as one: nobody hears of a change before it is in the file. */
    card_text(&redis->publish, "*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$10\r\nsvc-%N\r\n");
    card_print(&redis->publish, "$%zu\r\n", value.length);
    card_text(&redis->publish, VALUE "\r\n*3\r\n$7\r\nPUBLISH\r\n$7\r\nchanges\r\n");
    card_print(&redis->publish, "$%zu\r\n", value.length);
    card_text(&redis->publish, VALUE "\r\n*1\r\n$4\r\nEXEC\r\n");
}

static size_t take_memcached(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    size_t line = line_length(bytes, length);
    if (line == 0 || strncmp(bytes, "VALUE ", 6) != 0)
        return line == 0 ? 0 : in_order(connection, answer, bytes, line);
    const char *last_space = bytes + line;
    while (*--last_space != ' ')
        ;
    size_t whole = line + strtoul(last_space + 1, NULL, 10) + strlen("\r\nEND\r\n");
    return length < whole ? 0 : in_order(connection, answer, bytes, whole);
}

void make_memcached(struct protocol *memcached) {
    struct card value = value_card();
    memcached->take = take_memcached;
    card_text(&memcached->request[READ], "get svc-%N\r\n");
    card_text(&memcached->reply[READ], "VALUE svc-%N 0 ");
    card_print(&memcached->reply[READ], "%zu\r\n", value.length);
    card_text(&memcached->reply[READ], VALUE "\r\nEND\r\n");
    card_text(&memcached->request[WRITE], "set svc-%N 0 0 ");
    card_print(&memcached->request[WRITE], "%zu\r\n", value.length);
    card_text(&memcached->request[WRITE], VALUE "\r\n");
    card_text(&memcached->reply[WRITE], "STORED\r\n");
}
