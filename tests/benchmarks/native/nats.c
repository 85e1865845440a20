/* NATS: a bucket of its key-value store is a stream with a subject for each name.
 *
 * A look-up asks the stream for the last message of a subject ("direct get"), a write publishes one and waits for the
 * stream's word. Both are answered to an inbox, which names the connection and the slot: replies may overtake.
 */
#include "load.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STREAM "KV_services"
#define SUBJECT "$KV.services.svc-%N"

static uint32_t slot_of(const char *subject_end) {
    char three[4] = {subject_end[-3], subject_end[-2], subject_end[-1], 0};
    return (uint32_t)strtoul(three, NULL, 10);
}

/* "MSG subject sid bytes" or "HMSG subject sid head-bytes all-bytes", and behind the line the bytes. */
static size_t take_message(const char *bytes, size_t length, size_t line, struct answer *answer) {
    int has_head = bytes[0] == 'H';
    char words[256];
    if (line >= sizeof words)
        die("a long line from nats: %.*s", (int)line, bytes);
    memcpy(words, bytes, line);
    words[line] = 0;
    char *subject = strchr(words, ' ') + 1, *end = strchr(subject, ' ');
    char *sizes = end == NULL ? NULL : strchr(end + 1, ' ');
    if (sizes == NULL)
        die("a strange line from nats: %s", words);
    size_t head = has_head ? strtoul(sizes, &sizes, 10) : 0, all = strtoul(sizes, NULL, 10);
    size_t whole = line + all + 2;
    if (length < whole)
        return 0;
    *answer = (struct answer){ANSWER, slot_of(end), bytes + line + head, all - head};
    return whole;
}

static size_t take(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    size_t line = line_length(bytes, length);
    if (line == 0)
        return 0;
    if (strncmp(bytes, "MSG ", 4) == 0 || strncmp(bytes, "HMSG ", 5) == 0)
        return take_message(bytes, length, line, answer);
    if (strncmp(bytes, "-ERR", 4) == 0)
        die("nats: %.*s", (int)line, bytes);
    if (strncmp(bytes, "PING", 4) == 0)
        say(connection, "PONG\r\n", 6);
    answer->kind = strncmp(bytes, "PONG", 4) == 0 ? GREETED : CONTROL;
    return line;
}

void make_nats(struct protocol *nats) {
    struct card value = value_card();
    nats->take = take;
    nats->may_lose = 1;
    card_text(&nats->greeting,
        "CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true,\"protocol\":1}\r\n"
        "SUB inbox.%I.* 1\r\nPING\r\n");
    card_text(&nats->request[READ], "PUB $JS.API.DIRECT.GET." STREAM "." SUBJECT " inbox.%I.%T 0\r\n\r\n");
    nats->reply[READ] = value;
    card_text(&nats->request[WRITE], "PUB " SUBJECT " inbox.%I.%T ");
    card_print(&nats->request[WRITE], "%zu\r\n", value.length);
    card_text(&nats->request[WRITE], VALUE "\r\n");
    card_text(&nats->reply[WRITE], "{\"stream\":\"" STREAM "\",");
    nats->reply[WRITE].open_end = 1; /* the message's number */
    nats->publish = nats->request[WRITE];
    /* What a watcher of a bucket is: a consumer of the stream that pushes to its subject, and is kept in memory. One
     * whose connection has ended goes after half a second, so that it is no load in the next round. */
    const char *consumer = "{\"stream_name\":\"" STREAM "\",\"config\":{\"deliver_subject\":\"watch.%I\","
                           "\"deliver_policy\":\"last_per_subject\",\"ack_policy\":\"none\",\"mem_storage\":true,"
                           "\"num_replicas\":1,\"inactive_threshold\":500000000,"
                           "\"filter_subject\":\"" SUBJECT "\"}}";
    struct card wanted = {0};
    card_text(&wanted, consumer);
    card_text(&nats->watch, "SUB watch.%I 2\r\nPUB $JS.API.CONSUMER.CREATE." STREAM " inbox.%I.made ");
    card_print(&nats->watch, "%zu\r\n", wanted.length);
    card_text(&nats->watch, consumer);
    card_text(&nats->watch, "\r\n");
}
